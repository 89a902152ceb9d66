//! The extension backend's words. What the other backends want stands in tests/plain.rs.

use super::extension::{data, input, words};

fn filled(command: &str) -> Vec<String> {
    let variables = [
        ("SUBNET", "10.244.2.0/24".to_owned()),
        ("PUBLIC_IP", "$(reboot); x".to_owned()),
    ];
    words(command, &variables)
}

#[test]
fn a_command_is_split_before_its_variables_are_filled_in() {
    assert_eq!(
        filled("ip route add $SUBNET via ${PUBLIC_IP}"),
        ["ip", "route", "add", "10.244.2.0/24", "via", "$(reboot); x"]
    );
    assert_eq!(
        filled("a$SUBNET/b ${SUBNET}c $NOBODY$ $ ${open"),
        ["a10.244.2.0/24/b", "10.244.2.0/24c", "$", "$", "${open"]
    );
    assert!(filled("  ").is_empty());
}

#[test]
fn what_a_command_prints_comes_back_as_what_another_reads() {
    let published = data(b"T+ojW\xff=\n");
    assert_eq!(input(&published), "T+ojW\u{fffd}=");
    assert_eq!(input(&serde_json::Value::Null), "");
}
