//! What the system says of this process and of IPsec: files of /proc, read where they are asked for.

/// What the system says of this process and of IPsec.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Host {
    /// Resident memory, bytes.
    pub memory: u64,
    /// Processor time, seconds.
    pub processor: f64,
    /// When the process began, seconds since 1970.
    pub began: f64,
    /// Open descriptors.
    pub descriptors: u64,
    /// The kernel's counters of IPsec's errors, by their names there.
    pub xfrm: Vec<(String, u64)>,
}

impl Host {
    /// Reads it of the calling process and of its network namespace. What can't be read is zero, or not there.
    pub fn read() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let per = |name| {
            nix::unistd::sysconf(name)
                .ok()
                .flatten()
                .and_then(|value| u64::try_from(value).ok())
        };
        let page = per(nix::unistd::SysconfVar::PAGE_SIZE).unwrap_or(4096);
        let ticks = per(nix::unistd::SysconfVar::CLK_TCK).unwrap_or(100).max(1) as f64;
        let stat = read("/proc/self/stat");
        Self {
            memory: resident_pages(&read("/proc/self/statm")) * page,
            processor: processor_ticks(&stat) as f64 / ticks,
            began: boot_time(&read("/proc/stat")) as f64 + start_ticks(&stat) as f64 / ticks,
            descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
            xfrm: xfrm_counters(&read("/proc/thread-self/net/xfrm_stat")),
        }
    }
}

/// The second number of /proc/PID/statm (proc(5)).
fn resident_pages(statm: &str) -> u64 {
    let resident = statm.split_whitespace().nth(1);
    resident.and_then(|pages| pages.parse().ok()).unwrap_or_default()
}

/// The fields of /proc/PID/stat (proc(5)) from the third on; the second is a name that may hold spaces.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(") ").unwrap_or_default().1.split(' ')
}

/// `utime` and `stime`, the 14th and 15th field.
fn processor_ticks(stat: &str) -> u64 {
    let times = fields(stat).skip(11).take(2);
    times.filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

/// `starttime`, the 22nd field: ticks since the machine's start.
fn start_ticks(stat: &str) -> u64 {
    fields(stat)
        .nth(19)
        .and_then(|ticks| ticks.parse().ok())
        .unwrap_or_default()
}

/// `btime` of /proc/stat: when the machine started, seconds since 1970.
fn boot_time(stat: &str) -> u64 {
    let time = stat.lines().find_map(|line| line.strip_prefix("btime "));
    time.and_then(|time| time.parse().ok()).unwrap_or_default()
}

/// /proc/net/xfrm_stat (Documentation/networking/xfrm_proc.rst): a name and a number a line.
fn xfrm_counters(text: &str) -> Vec<(String, u64)> {
    let line = |line: &str| {
        let (name, number) = line.trim().split_once(char::is_whitespace)?;
        Some((name.to_owned(), number.trim().parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn what_proc_says_is_read() {
        assert_eq!(resident_pages("2501 1210 900 300 0 400 0\n"), 1210);
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 100 0 0 0 250 31 0 0 20 0 3 0 99 1 2 3";
        assert_eq!((processor_ticks(stat), start_ticks(stat)), (281, 99));
        assert_eq!(boot_time("cpu  1 2\nbtime 1764000000\nprocesses 9\n"), 1_764_000_000);
        let xfrm = "XfrmInError             \t0\nXfrmInNoStates          \t17\nnonsense\n";
        let wanted = vec![("XfrmInError".to_owned(), 0), ("XfrmInNoStates".to_owned(), 17)];
        assert_eq!(xfrm_counters(xfrm), wanted);
        for text in ["", " ", ")", "1 (x) S", "\u{0}\n\n", "btime x"] {
            assert_eq!((resident_pages(text), processor_ticks(text)), (0, 0), "{text:?}");
            assert_eq!((start_ticks(text), boot_time(text)), (0, 0), "{text:?}");
        }
        for text in ["", " ", ")", "1 (x) S", "\u{0}\n\n"] {
            assert_eq!(xfrm_counters(text), Vec::new(), "{text:?}");
        }
        let here = Host::read();
        assert!(here.memory > 1 << 20 && here.descriptors > 2, "{here:?}");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        assert!((0.0..1e6).contains(&(now.as_secs_f64() - here.began + 2.0)), "{here:?}");
    }
}
