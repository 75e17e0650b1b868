//! Sets the cfg `gpu_backend` if this build has a GPU backend: with the feature `gpu`, and on macOS
//! always.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(gpu_backend)");
    let asked_for = std::env::var_os("CARGO_FEATURE_GPU").is_some();
    let on_macos = std::env::var_os("CARGO_CFG_TARGET_OS").is_some_and(|target| target == "macos");
    if asked_for || on_macos {
        println!("cargo::rustc-cfg=gpu_backend");
    }
}
