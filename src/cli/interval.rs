//! How often something is asked again, as the command line has it.

use std::time::Duration;

/// `text` as seconds (`2`, `0.5`), or with a unit (`500ms`, `2s`, `1m`), from `least` to `most`.
pub(super) fn parse(text: &str, least: Duration, most: Duration) -> Result<Duration, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[number.len()..] {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        _ => f64::NAN,
    };
    let plain = number.chars().all(|c| c.is_ascii_digit() || c == '.');
    let time = number.parse::<f64>().ok().filter(|_| plain);
    let time = time.and_then(|number| Duration::try_from_secs_f64(number * unit).ok());
    time.filter(|time| (least..=most).contains(time))
        .ok_or_else(|| format!("a time from {least:?} to {most:?} is needed, such as 2s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_unit_or_is_in_seconds_and_has_bounds() {
        let parse = |text| parse(text, Duration::from_millis(200), Duration::from_secs(60)).ok();
        for (text, milliseconds) in [
            ("2", 2000),
            ("0.5", 500),
            ("500ms", 500),
            ("2s", 2000),
            ("1m", 60_000),
            ("200ms", 200),
        ] {
            assert_eq!(parse(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in [
            "",
            "0",
            "100ms",
            "61s",
            "2h",
            "-1",
            "1e1",
            "inf",
            "NaN",
            "s",
            "1.2.3",
            "9999999999999999999999m",
            "1ß",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
