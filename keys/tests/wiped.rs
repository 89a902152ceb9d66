//! Nothing secret stays in memory: not in heap blocks that are freed, not on the stack, not anywhere a debugger, a core
//! dump or a neighbour of the heap could look.
//!
//! The first search sees each heap block as it is freed; the second reads all writable memory of this process from
//! /proc/self/mem while the thread that worked is waiting. What they look for comes from `vectors.txt` and is kept only
//! in a masked form, so that the search does not find itself. A piece of 8 bytes is enough to be found.

#![expect(clippy::unwrap_used, reason = "a test may")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use keys::{Cipher, Encoded, EpochSecret, Pair, Psk, SaKey, Spi};
use ring::hmac;
use zeroize::Zeroizing;

#[expect(dead_code, reason = "the plain values are for other tests")]
mod cases;

use cases::{Case, cases};

#[test]
fn after_use_nothing_secret_is_left_anywhere() {
    let _alone = alone();
    for case in cases() {
        let (found, ()) = worked(|| drop(Held::new(&case)));
        assert_eq!(found, none(), "left in memory");
        assert_eq!(freed(), none(), "freed unwiped");
    }
}

#[test]
fn during_use_only_the_types_hold_secrets_and_no_passing_value_stays() {
    let _alone = alone();
    for case in cases() {
        let (found, held) = worked(|| Held::new(&case));
        for name in [
            "psk_prk",
            "a.secret",
            "b.secret",
            "pair_prk",
            "ab.probe_key",
            "ba.probe_key",
        ] {
            assert!(found.contains(name), "the search misses {name}, which is in use");
        }
        for cipher in Cipher::ALL {
            for way in ["ab", "ba", "ab.udp", "ba.udp"] {
                assert!(
                    found.contains(&*format!("{way}.{cipher}")),
                    "the search misses a key that is in use"
                );
            }
        }
        for name in ["psk", "auth_key", "dh", "states"] {
            assert!(!found.contains(name), "{name} has passed and is still there");
        }
        assert_eq!(freed(), none(), "freed unwiped");
        drop(held);
    }
}

/// Shows that the search reaches the stack, and why every computation has to be followed by a wipe.
#[test]
fn without_a_wipe_the_search_finds_what_ring_leaves_on_the_stack() {
    let _alone = alone();
    let case = &cases()[0];
    let (found, ()) = worked(|| {
        let key = plain(case.text("auth_key"));
        black_box(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), b"statement"));
    });
    assert!(found.contains("states"));
}

#[test]
fn the_search_finds_a_heap_block_that_is_freed_unwiped() {
    let _alone = alone();
    let case = &cases()[0];
    let (_, ()) = worked(|| drop(black_box(plain(case.text("pair_prk")).to_vec())));
    assert_eq!(freed(), BTreeSet::from(["pair_prk"]));
}

/// Everything that the crate makes of one case, at both ends.
struct Held {
    _psk: Psk,
    _secrets: [EpochSecret; 2],
    _pairs: [(keys::Inbound, keys::ProbeKey); 2],
    _sa_keys: Vec<SaKey>,
}

impl Held {
    fn new(case: &Case) -> Self {
        let psk = Psk::new(&plain(case.text("psk")), case.text("network_name")).unwrap();
        let secrets = ["a.secret", "b.secret"].map(|name| cases::secret(&plain(case.text(name))));
        let statements = ["a.statement", "b.statement"].map(|name| Encoded::try_from(&*case.bytes(name)).unwrap());
        for (statement, tag) in statements.iter().zip(["a.tag", "b.tag"]) {
            assert!(psk.verify(statement.as_bytes(), &keys::Tag(case.array(tag))));
        }
        let mut sa_keys = Vec::new();
        let pairs = [(0, 1, "ab", "ba"), (1, 0, "ba", "ab")].map(|(own, peer, forth, back)| {
            let [forth, back] =
                [forth, back].map(|way| Spi(u32::from_str_radix(&case.text(&format!("{way}.spi"))[2..], 16).unwrap()));
            let derive = || {
                Pair::derive(
                    &psk,
                    &secrets[own],
                    &statements[own],
                    &secrets[peer].public(),
                    &statements[peer],
                )
                .unwrap()
            };
            for cipher in Cipher::ALL {
                let pair = derive();
                sa_keys.push(pair.outbound.into_key(cipher, forth));
                sa_keys.extend(derive().outbound.into_keys(cipher, forth));
                sa_keys.push(pair.inbound.key(cipher, back));
            }
            let Pair {
                inbound,
                probe,
                outbound: _,
            } = derive();
            assert!(!probe.open(b"message", &probe.seal(b"message")));
            (inbound, probe)
        });
        Self {
            _psk: psk,
            _secrets: secrets,
            _pairs: pairs,
            _sa_keys: sa_keys,
        }
    }
}

/// Does `work` in a thread of its own and, while that waits, says which secrets are in writable memory.
fn worked<T: Send>(work: impl FnOnce() -> T + Send) -> (BTreeSet<&'static str>, T) {
    needles();
    for seen in &FREED {
        seen.store(0, Ordering::SeqCst);
    }
    let (done, is_done) = sync_channel(0);
    let (end, may_end) = sync_channel::<()>(0);
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let result = below(work);
            done.send(()).unwrap();
            may_end.recv().unwrap();
            result
        });
        is_done.recv().unwrap();
        let found = in_memory();
        end.send(()).unwrap();
        (found, thread.join().unwrap())
    })
}

/// Works further down the stack than the frames that wait afterwards reach, so that these cover nothing up.
#[inline(never)]
fn below<T>(work: impl FnOnce() -> T) -> T {
    let room = black_box([0_u8; 8192]);
    SPYING.store(true, Ordering::SeqCst);
    let result = work();
    SPYING.store(false, Ordering::SeqCst);
    black_box(&room);
    result
}

/// Secrets in any writable mapping of this process.
fn in_memory() -> BTreeSet<&'static str> {
    let needles = needles();
    let memory = File::open("/proc/self/mem").unwrap();
    let mut page = vec![0; 1 << 16];
    let mut found = BTreeSet::new();
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next().unwrap(), words.next().unwrap());
        if !rights.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let [mut at, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        // Windows that straddle two readings are seen because each reading begins 7 bytes before the last one's end.
        while at + 8 <= end {
            let len = page.len().min((end - at) as usize);
            memory.read_exact_at(&mut page[..len], at).unwrap();
            found.extend(needles.pieces_in(&page[..len]).map(|name| needles.names[name]));
            at += len as u64 - 7;
        }
    }
    page.fill(0);
    black_box(page);
    found
}

/// What is looked for.
struct Needles {
    names: Vec<&'static str>,
    /// Masked pieces of 8 bytes, and the secret that each is of.
    pieces: BTreeMap<u64, usize>,
    /// Which first two bytes any masked piece has: nearly all memory is passed over by this alone.
    starts: Vec<bool>,
}

impl Needles {
    fn pieces_in(&self, memory: &[u8]) -> impl Iterator<Item = usize> {
        memory.array_windows::<8>().filter_map(|window| {
            let piece = u64::from_be_bytes(*window) ^ MASK;
            self.starts[(piece >> 48) as usize]
                .then(|| self.pieces.get(&piece).copied())
                .flatten()
        })
    }
}

fn needles() -> &'static Needles {
    NEEDLES.get_or_init(|| {
        let mut needles = Needles {
            names: Vec::new(),
            pieces: BTreeMap::new(),
            starts: vec![false; 1 << 16],
        };
        for case in cases() {
            for (index, &name) in SECRETS.iter().enumerate() {
                for piece in case
                    .text(name)
                    .split(' ')
                    .flat_map(|hex| hex.as_bytes().as_chunks::<16>().0)
                {
                    let masked = piece
                        .iter()
                        .fold(0, |piece, &digit| piece << 4 | u64::from(cases::digit(digit) ^ 0xa));
                    needles.pieces.insert(masked, index);
                    needles.starts[(masked >> 48) as usize] = true;
                }
            }
        }
        needles.names = SECRETS.to_vec();
        needles
    })
}

/// The bytes of a hexadecimal number in one heap block that is wiped.
fn plain(hex: &str) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(vec![0; hex.len() / 2]);
    for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().as_chunks::<2>().0) {
        *byte = cases::digit(digits[0]) << 4 | cases::digit(digits[1]);
    }
    bytes
}

/// Secrets that freed blocks held since the last work began.
fn freed() -> BTreeSet<&'static str> {
    let seen = SECRETS
        .iter()
        .zip(&FREED)
        .filter(|(_, seen)| seen.load(Ordering::SeqCst) > 0);
    seen.map(|(&name, _)| name).collect()
}

fn none() -> BTreeSet<&'static str> {
    BTreeSet::new()
}

/// One test at a time: the searches see all memory.
fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The system's allocator, which looks at each block before it is freed. `realloc` is the trait's own: a new block,
/// a copy, and the old block freed under the spy's eyes.
struct Spy;

// SAFETY: every call goes to `System` with the arguments as they came; what stands before it only reads.
unsafe impl GlobalAlloc for Spy {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps `alloc`'s contract, which is the same one. Zeroed, so that a read of the whole block
        // reads nothing uninitialised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if SPYING.load(Ordering::SeqCst)
            && let Some(needles) = NEEDLES.get()
        {
            // SAFETY: the caller gives up a block of this layout, which `alloc` initialised, and nobody else uses it.
            let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
            for name in needles.pieces_in(bytes) {
                FREED[name].fetch_add(1, Ordering::SeqCst);
            }
        }
        // SAFETY: the caller keeps `dealloc`'s contract, which is the same one.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static SPY: Spy = Spy;
static SPYING: AtomicBool = AtomicBool::new(false);
static NEEDLES: OnceLock<Needles> = OnceLock::new();
static FREED: [AtomicUsize; SECRETS.len()] = [const { AtomicUsize::new(0) }; SECRETS.len()];
static ALONE: Mutex<()> = Mutex::new(());

const MASK: u64 = 0xaaaa_aaaa_aaaa_aaaa;

const SECRETS: [&str; 22] = [
    "psk",
    "psk_prk",
    "auth_key",
    "a.secret",
    "b.secret",
    "dh",
    "pair_prk",
    "states",
    "ab.aes128gcm16",
    "ab.aes256gcm16",
    "ab.chacha20poly1305",
    "ba.aes128gcm16",
    "ba.aes256gcm16",
    "ba.chacha20poly1305",
    "ab.udp.aes128gcm16",
    "ab.udp.aes256gcm16",
    "ab.udp.chacha20poly1305",
    "ba.udp.aes128gcm16",
    "ba.udp.aes256gcm16",
    "ba.udp.chacha20poly1305",
    "ab.probe_key",
    "ba.probe_key",
];
