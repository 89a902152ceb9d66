//! No freed block of the heap holds a key, whatever the kernel answers: an allocator looks at each block as it is freed.

#![allow(clippy::unwrap_used, reason = "it is how a test fails")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fmt::Write as _,
    sync::atomic::{AtomicUsize, Ordering},
};

use nix::sched::{CloneFlags, unshare};
use xfrm::{Aead, Batch, Events, Sa, Xfrm};

/// Not on the heap, and nothing else in the process looks like it.
static KEY: [u8; 20] = [
    0xc3, 0x5a, 0x99, 0x17, 0xe4, 0x6d, 0xb2, 0x38, 0xf1, 0x0c, 0x83, 0xae, 0x55, 0xd7, 0x29, 0x6b, 0x91, 0x4e, 0xfa,
    0x06,
];

static FREED_WITH_KEY: AtomicUsize = AtomicUsize::new(0);

struct Spy;

// SAFETY: every call goes to the system's allocator with the arguments as they came; a block is only read, within its
// own layout, before it is given back. `realloc` is left to the trait, which frees the old block through `dealloc`.
unsafe impl GlobalAlloc for Spy {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is handed on. Zeroed, so that reading it whole is reading initialised memory.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block is live until the next line and as long as its layout says.
        let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
        // Eight bytes in a row are no accident; a buffer cut in two by a move would still show one half.
        if KEY
            .chunks_exact(8)
            .any(|part| bytes.windows(8).any(|window| window == part))
        {
            FREED_WITH_KEY.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static SPY: Spy = Spy;

fn left_behind(work: impl FnOnce()) -> usize {
    let before = FREED_WITH_KEY.load(Ordering::Relaxed);
    work();
    FREED_WITH_KEY.load(Ordering::Relaxed) - before
}

#[test]
fn no_freed_block_and_no_error_holds_the_key_of_an_sa() {
    assert_eq!(
        left_behind(|| drop(KEY.to_vec())),
        1,
        "the spy sees a key that is left behind"
    );

    // Without root the namespace stays, and the kernel refuses the rest: nothing is made in it.
    let own_namespace = unshare(CloneFlags::CLONE_NEWNET).is_ok();
    let mut said = String::new();
    let sa = |spi| Sa {
        src: "192.0.2.1".parse().unwrap(),
        dst: "192.0.2.2".parse().unwrap(),
        spi,
        reqid: 1,
        algorithm: Aead::AES_128_GCM_16,
        encap: None,
        replay_window: 1024,
        esn: true,
        direction: None,
        limits: xfrm::Limits::default(),
        af_unspec: true,
    };
    let leftovers = left_behind(|| {
        let mut xfrm = Xfrm::open().unwrap();
        let mut events = Events::open().ok();
        let mut batch = Batch::new();
        // Enough for the batch to move several times, and for more than one send. The last two are refused everywhere.
        for spi in (1..=300).chain([300]) {
            batch.add_sa(&sa(0x1000 + spi), &KEY);
        }
        batch.add_sa(
            &Sa {
                algorithm: Aead {
                    name: "no(such)".into(),
                    ..Aead::AES_128_GCM_16
                },
                ..sa(1)
            },
            &KEY,
        );
        let results = xfrm.execute(batch);
        assert_eq!(results.len(), 302);
        let made = results.iter().filter(|result| result.is_ok()).count();
        assert!(results[300].is_err() && results[301].is_err());
        assert!(made == 0 || own_namespace);
        if let Ok(dump) = xfrm.dump_sas() {
            assert_eq!(dump.len(), made);
            writeln!(said, "{dump:?}").unwrap();
        }
        if let Some(events) = &mut events {
            let mut seen = 0;
            events
                .read(&mut |event| seen += usize::from(write!(said, "{event:?}").is_ok()))
                .unwrap();
            assert!(seen >= made);
        }
        for error in results.into_iter().filter_map(Result::err) {
            writeln!(said, "{error} {error:?}").unwrap();
        }
        let abandoned = {
            let mut batch = Batch::new();
            batch.add_sa(&sa(2), &KEY);
            batch
        };
        drop(abandoned);
    });
    assert_eq!(leftovers, 0);

    let decimal = format!("{}, {}, {}", KEY[0], KEY[1], KEY[2]);
    assert!(!said.is_empty());
    for form in [decimal.as_str(), "c35a99", "c3, 5a, 99", "0xc3, 0x5a"] {
        assert!(!said.to_lowercase().contains(form), "{form}");
    }
}
