//! Stack overflows of foreign work (chat templates, tokenizers) end that work and not the program.
//!
//! Rust's own handler says that a stack overflowed and aborts. Ours is called before it. On a
//! thread of [`finetune_dataset::guard`] it puts the thread to sleep for good, and the thread that
//! waits for the work reports the file. Every other fault goes on to the handler that was there.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// The signals of a fault in a page that may not be touched. Systems differ.
const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// What each signal did before. It is set before our handler is, and never freed.
static BEFORE: [AtomicPtr<libc::sigaction>; 2] = [const { AtomicPtr::new(ptr::null_mut()) }; 2];

/// Installs the handler. If the system refuses it, nothing changes.
#[expect(unsafe_code, reason = "signal handlers are C functions")]
pub(crate) fn listen() {
    for (signal, before) in SIGNALS.into_iter().zip(&BEFORE) {
        // SAFETY: both structures are plain integers, for which zero is a value. The calls read one
        // and fill the other, which lives for ever. The handler does only what a signal handler may
        // do.
        unsafe {
            let old: &'static mut libc::sigaction = Box::leak(Box::new(std::mem::zeroed()));
            if libc::sigaction(signal, ptr::null(), old) != 0 {
                continue;
            }
            before.store(old, Ordering::SeqCst);
            let mut new: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
            new.sa_sigaction = handler as libc::sighandler_t;
            // On the stack for signals that Rust gives each of its threads: the thread's own stack
            // is full.
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut new.sa_mask);
            libc::sigaction(signal, &new, ptr::null_mut());
        }
    }
}

#[expect(unsafe_code, reason = "passes a signal on to the handler that was there")]
extern "C" fn handle(signal: libc::c_int, information: *mut libc::siginfo_t, context: *mut libc::c_void) {
    finetune_dataset::guard::faulted();
    let place = SIGNALS.iter().position(|known| *known == signal).unwrap_or(0);
    let before = BEFORE[place].load(Ordering::SeqCst);
    // SAFETY: `before` is null or points to what sigaction filled and nothing writes to any more. A
    // handler set with SA_SIGINFO takes these three arguments, another one the number. Without a
    // handler the default is set, and the fault comes again.
    unsafe {
        if before.is_null() || matches!((*before).sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) {
            libc::signal(signal, libc::SIG_DFL);
        } else if (*before).sa_flags & libc::SA_SIGINFO != 0 {
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute((*before).sa_sigaction);
            handler(signal, information, context);
        } else {
            let handler: extern "C" fn(libc::c_int) = std::mem::transmute((*before).sa_sigaction);
            handler(signal);
        }
    }
}
