//! The system's allocator with `finetune_dataset::guard` before it.

use std::alloc::{GlobalAlloc, Layout, System};

use finetune_dataset::guard;

pub(crate) struct Counted;

// SAFETY: every call is the system allocator's own, with the caller's promises; what is called
// before it hands out nothing.
#[expect(unsafe_code, reason = "a global allocator hands out memory")]
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        guard::allocated(layout.size());
        // SAFETY: see above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        guard::freed(layout.size());
        // SAFETY: see above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        guard::allocated(layout.size());
        // SAFETY: see above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        guard::allocated(size.saturating_sub(layout.size()));
        guard::freed(layout.size().saturating_sub(size));
        // SAFETY: see above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
