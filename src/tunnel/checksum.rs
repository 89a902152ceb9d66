//! The Internet checksum (RFC 1071): a ones' complement sum of 16-bit words.
//!
//! Sums are kept in the machine's own byte order, which RFC 1071 section 2(B) allows: what is folded is written back as
//! it lies in memory. A sum that is not folded yet is a `u64`; a 64 KiB packet fills 2^47 of it. The loops are plain Rust
//! that the compiler turns into vector instructions, on x86-64 once more for AVX2, which is chosen as the program runs.

/// Bytes of a step of the loops.
const STEP: usize = 64;

/// The sum of `data`, an odd last byte filled up with zero, as for the last part of a packet.
pub(super) fn sum(data: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { sum_avx2(data) };
    }
    sum_any(data)
}

/// Copies `from` to `to`, which is as long, and sums it on the way.
pub(super) fn copy(to: &mut [u8], from: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { copy_avx2(to, from) };
    }
    copy_any(to, from)
}

/// The 16-bit sum of a sum.
pub(super) fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// The checksum of what has this sum, as the two bytes that stand in a header.
pub(super) fn finish(sum: u64) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}

/// Whether what has this sum, its checksum among it, is as it was sent.
pub(super) fn holds(sum: u64) -> bool {
    fold(sum) == 0xffff
}

/// The sum of a number of the pseudo-header or another field, given in host order.
pub(super) fn word(value: u16) -> u64 {
    u64::from(value.to_be())
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(data: &[u8]) -> u64 {
    sum_any(data)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn copy_avx2(to: &mut [u8], from: &[u8]) -> u64 {
    copy_any(to, from)
}

#[inline(always)]
fn sum_any(data: &[u8]) -> u64 {
    let (steps, rest) = data.as_chunks::<STEP>();
    let mut lanes = [0; STEP / 8];
    for step in steps {
        add(&mut lanes, step);
    }
    lanes.iter().sum::<u64>() + sum_rest(rest)
}

#[inline(always)]
fn copy_any(to: &mut [u8], from: &[u8]) -> u64 {
    assert_eq!(to.len(), from.len(), "a copy is as long as what it is made of");
    let (targets, rest_to) = to.as_chunks_mut::<STEP>();
    let (steps, rest) = from.as_chunks::<STEP>();
    let mut lanes = [0; STEP / 8];
    for (target, step) in targets.iter_mut().zip(steps) {
        *target = *step;
        add(&mut lanes, step);
    }
    rest_to.copy_from_slice(rest);
    lanes.iter().sum::<u64>() + sum_rest(rest)
}

/// Both 32-bit halves of each word go to one lane: of 64 KiB no lane gets more than 2^44.
#[inline(always)]
fn add(lanes: &mut [u64; STEP / 8], step: &[u8; STEP]) {
    let (words, _) = step.as_chunks::<8>();
    for (lane, word) in lanes.iter_mut().zip(words) {
        let word = u64::from_ne_bytes(*word);
        *lane += (word & 0xffff_ffff) + (word >> 32);
    }
}

#[inline(always)]
fn sum_rest(rest: &[u8]) -> u64 {
    let (words, last) = rest.as_chunks::<8>();
    let mut sum = 0;
    for word in words {
        let word = u64::from_ne_bytes(*word);
        sum += (word & 0xffff_ffff) + (word >> 32);
    }
    let mut padded = [0; 8];
    padded[..last.len()].copy_from_slice(last);
    let word = u64::from_ne_bytes(padded);
    sum + (word & 0xffff_ffff) + (word >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As RFC 1071 says it: words of network order, carries added at the end.
    fn naive(data: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    proptest! {
        #[test]
        fn the_sum_is_rfc_1071s(data in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert_eq!(u16::from_be(fold(sum(&data))), naive(&data));
            prop_assert_eq!(fold(sum_any(&data)), fold(sum(&data)));
            let mut to = vec![0; data.len()];
            prop_assert_eq!(fold(copy(&mut to, &data)), fold(sum(&data)));
            prop_assert_eq!(fold(copy_any(&mut to, &data)), fold(sum(&data)));
            prop_assert_eq!(to, data);
        }

        #[test]
        fn sums_of_parts_add_up_to_the_sum_of_the_whole(data in proptest::collection::vec(any::<u8>(), 0..300), at in 0usize..150) {
            let (one, other) = data.split_at((2 * at).min(data.len() & !1));
            prop_assert_eq!(fold(sum(one) + sum(other)), fold(sum(&data)));
        }

        #[test]
        fn what_is_finished_holds_and_a_changed_bit_shows(
            mut data in proptest::collection::vec(any::<u8>(), 2..300), bit in 0usize..8, at in any::<proptest::sample::Index>()
        ) {
            data[..2].fill(0);
            let checksum = finish(sum(&data));
            data[..2].copy_from_slice(&checksum);
            prop_assert!(holds(sum(&data)));
            let at = at.index(data.len());
            data[at] ^= 1 << bit;
            prop_assert!(!holds(sum(&data)));
        }
    }

    #[test]
    fn the_largest_packet_of_ones_does_not_overflow() {
        let data = vec![0xff; 65_575];
        assert_eq!(u16::from_be(fold(sum(&data))), naive(&data));
        assert_eq!(u16::from_be(fold(word(0x1234))), 0x1234);
    }
}
