//! MTU.
/// x
pub fn inner_mtu(outer: u32, _cipher: keys::Cipher, v6: bool, udp: bool) -> Option<u32> {
    outer
        .checked_sub(if v6 { 72 } else { 52 } + if udp { 8 } else { 0 })
        .map(|m| (m & !3) - 2)
}
