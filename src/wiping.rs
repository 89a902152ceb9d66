//! An allocator that wipes what is given back, once it is told to.
//!
//! What a library's buffers held is out of reach when they are gone: a Secret that came by HTTP and TLS was in a dozen of
//! them. The memory of all is wiped as it is freed; where no secret comes that way, it costs one look at a flag.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, Ordering};

static WIPES: AtomicBool = AtomicBool::new(false);

/// From now on, freed memory is wiped. For the life of the process, where it has [`Wiping`] as its allocator.
pub fn begin() {
    WIPES.store(true, Ordering::Relaxed);
}

/// Gives what nobody uses back to the system: what a burst of work freed lies between what is kept, and would count as this
/// process's for good.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) touches free memory alone, and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The system's allocator, wiping after [`begin`].
#[derive(Debug)]
pub struct Wiping;

// SAFETY: all memory comes from and goes to `System` with the layouts that it was asked for with; a block is written to
// only by who gives it back, and over its own length.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as our caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as our caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if WIPES.load(Ordering::Relaxed) {
            // SAFETY: the block is the caller's, of this size, and nobody reads it any more. A write that the compiler
            // could see to be read by nobody would be left out; this call is not.
            unsafe { libc::explicit_bzero(block.cast(), layout.size()) };
        }
        // SAFETY: as our caller promises.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !WIPES.load(Ordering::Relaxed) {
            // SAFETY: as our caller promises.
            return unsafe { System.realloc(block, layout, size) };
        }
        // Where it is moved, the system would leave the old block as it is.
        // SAFETY: the caller promises that `size` is not 0 and, rounded up to this alignment, no overflow.
        let larger = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
        if !larger.is_null() {
            // SAFETY: both blocks are at least as long, and apart; the old one is given back once.
            unsafe {
                std::ptr::copy_nonoverlapping(block, larger, layout.size().min(size));
                self.dealloc(block, layout);
            }
        }
        larger
    }
}
