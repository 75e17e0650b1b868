//! The functions of the verbs library.
//!
//! The library is opened when it is there, so building needs neither its header nor the library.
//! With the feature `ibverbs` it is linked through `ibverbs-sys` instead, which the crate `ibverbs`
//! calls too.

use std::ffi::{OsString, c_char, c_int, c_void};

use crate::layout::{self, DeviceAttr, Gid, PortAttr, QpAttr, QpInitAttr};

macro_rules! functions {
    (
        required { $($name:ident: fn($($argument:ty),*) $(-> $returned:ty)?;)* }
        optional { $($maybe:ident: fn($($maybe_argument:ty),*) -> $maybe_returned:ty;)* }
    ) => {
        /// The functions of the library.
        pub(crate) struct Library {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) $(-> $returned)?,)*
            $(pub(crate) $maybe: Option<unsafe extern "C" fn($($maybe_argument),*) -> $maybe_returned>,)*
            /// Keeps the functions where they are; none if they are part of the program.
            _library: Option<libloading::Library>,
        }

        impl Library {
            /// Opens the library at `path`, which must be a verbs library.
            pub(crate) fn open(path: &OsString) -> Result<Library, libloading::Error> {
                // SAFETY: the verbs libraries have no initialisers with conditions of their own; a
                // library that the user names is theirs to vouch for. The types of the functions
                // are those of `infiniband/verbs.h`, whose layouts a test compares. The pointers
                // stay valid: `_library` lives as long as they do.
                unsafe {
                    let library = libloading::Library::new(path)?;
                    Ok(Library {
                        $($name: *library.get(stringify!($name).as_bytes())?,)*
                        $($maybe: library.get(stringify!($maybe).as_bytes()).ok().map(|symbol| *symbol),)*
                        _library: Some(library),
                    })
                }
            }

            /// The library that `ibverbs-sys` links.
            #[cfg(all(feature = "ibverbs", target_os = "linux"))]
            pub(crate) fn linked() -> Library {
                // SAFETY: the same functions as above under the types that bindgen gives them,
                // which are pointers to the structures of the same header; a test compares ours
                // with it.
                unsafe {
                    Library {
                        $($name: std::mem::transmute::<*const (), unsafe extern "C" fn($($argument),*) $(-> $returned)?>(
                            ibverbs_sys::$name as *const (),
                        ),)*
                        $($maybe: Some(std::mem::transmute::<*const (), unsafe extern "C" fn($($maybe_argument),*) -> $maybe_returned>(
                            ibverbs_sys::$maybe as *const (),
                        )),)*
                        _library: None,
                    }
                }
            }
        }
    };
}

functions! {
    required {
        ibv_get_device_list: fn(*mut c_int) -> *mut *mut layout::Device;
        ibv_free_device_list: fn(*mut *mut layout::Device);
        ibv_get_device_name: fn(*mut layout::Device) -> *const c_char;
        ibv_open_device: fn(*mut layout::Device) -> *mut layout::Context;
        ibv_close_device: fn(*mut layout::Context) -> c_int;
        ibv_alloc_pd: fn(*mut layout::Context) -> *mut layout::Pd;
        ibv_dealloc_pd: fn(*mut layout::Pd) -> c_int;
        ibv_reg_mr: fn(*mut layout::Pd, *mut c_void, usize, c_int) -> *mut layout::Mr;
        ibv_dereg_mr: fn(*mut layout::Mr) -> c_int;
        ibv_create_cq: fn(*mut layout::Context, c_int, *mut c_void, *mut c_void, c_int) -> *mut layout::CompletionQueue;
        ibv_destroy_cq: fn(*mut layout::CompletionQueue) -> c_int;
        ibv_create_qp: fn(*mut layout::Pd, *mut QpInitAttr) -> *mut layout::Qp;
        ibv_destroy_qp: fn(*mut layout::Qp) -> c_int;
        ibv_modify_qp: fn(*mut layout::Qp, *mut QpAttr, c_int) -> c_int;
        ibv_query_port: fn(*mut layout::Context, u8, *mut PortAttr) -> c_int;
        ibv_query_gid: fn(*mut layout::Context, u8, c_int, *mut Gid) -> c_int;
    }
    optional {
        ibv_query_device: fn(*mut layout::Context, *mut DeviceAttr) -> c_int;
        ibv_query_qp: fn(*mut layout::Qp, *mut QpAttr, c_int, *mut QpInitAttr) -> c_int;
    }
}
