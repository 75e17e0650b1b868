//! What `finetune --version` says of this build.

use std::sync::LazyLock;

use finetune_model::HAS_GPU_BACKEND;

/// The version alone, for `-V` and where programs compare it.
pub(crate) const SHORT: &str = env!("CARGO_PKG_VERSION");

/// The version and the commit, where ranks compare what they run.
pub(crate) fn build() -> String {
    format!("{SHORT} of commit {}", env!("FINETUNE_COMMIT"))
}

static LONG: LazyLock<String> = LazyLock::new(|| {
    let gpu = if cfg!(target_os = "macos") { "cpu, metal" } else { "cpu, vulkan" };
    let backends = if HAS_GPU_BACKEND { gpu } else { "cpu" };
    let features = [("gpu", cfg!(feature = "gpu")), ("ibverbs", cfg!(feature = "ibverbs"))];
    let features: Vec<&str> = features.iter().filter(|(_, is_on)| *is_on).map(|(name, _)| *name).collect();
    let features = if features.is_empty() { "none".to_owned() } else { features.join(", ") };
    let (commit, target) = (env!("FINETUNE_COMMIT"), env!("FINETUNE_TARGET"));
    format!(
        "{SHORT}\ncommit     {commit}\ntarget     {target}\nbackends   {backends}\nfeatures   {features}\nallocator  mimalloc"
    )
});

/// What `--version` prints after the program's name. Its first line is [`SHORT`]: `cluster doctor`
/// compares that line with other hosts'.
pub(crate) fn long() -> &'static str {
    &LONG
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_is_the_version_alone() {
        let lines: Vec<&str> = long().lines().collect();
        assert_eq!(lines[0], SHORT);
        let names: Vec<&str> = lines[1..].iter().filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(names, ["commit", "target", "backends", "features", "allocator"]);
        assert!(lines[1..].iter().all(|line| line.split_whitespace().count() > 1), "{lines:?}");
    }
}
