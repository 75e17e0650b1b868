//! Which verbs library to open, and what to say when there is none.

use std::ffi::OsString;
use std::sync::OnceLock;

use crate::error::RdmaError;
use crate::functions::Library;

/// Names the library to open instead of the system's.
pub(crate) const LIBRARY_VARIABLE: &str = "FINETUNE_VERBS_LIB";

/// The library of this process, opened by the first caller and never closed.
pub(crate) fn library() -> Result<&'static Library, RdmaError> {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    if let Some(library) = LIBRARY.get() {
        return Ok(library);
    }
    #[cfg(all(feature = "ibverbs", target_os = "linux"))]
    if std::env::var_os(LIBRARY_VARIABLE).is_none() {
        return Ok(LIBRARY.get_or_init(Library::linked));
    }
    let candidates: Vec<OsString> = match std::env::var_os(LIBRARY_VARIABLE) {
        Some(path) => vec![path],
        None if cfg!(target_os = "macos") => vec!["/usr/lib/librdma.dylib".into(), "librdma.dylib".into()],
        None if cfg!(target_os = "linux") => vec!["libibverbs.so.1".into()],
        None => {
            let because = format!("{} has no verbs that this program knows", std::env::consts::OS);
            return Err(RdmaError::Unavailable { because, advice: "use `tcp`" });
        }
    };
    let mut because = String::new();
    for path in &candidates {
        match Library::open(path) {
            Ok(library) => return Ok(LIBRARY.get_or_init(|| library)),
            Err(error) => {
                let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                because = format!("the verbs library does not load: {cause}");
            }
        }
    }
    let advice = if std::env::var_os(LIBRARY_VARIABLE).is_some() {
        "FINETUNE_VERBS_LIB names the library: unset it to use the system's, or use `tcp`"
    } else if cfg!(target_os = "macos") {
        "it comes with macOS 26.2 and needs a Mac with Thunderbolt 5; else use `tcp`"
    } else {
        "install it (Debian: libibverbs1 and ibverbs-providers), or use `tcp`"
    };
    Err(RdmaError::Unavailable { because, advice })
}
