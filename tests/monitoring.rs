//! What a monitoring system is given: names of metrics by Prometheus' conventions, and a dashboard and alerts that ask for
//! nothing else. What needs `promtool`, of Debian's package prometheus, is ignored by default; the variable `PROMTOOL`
//! says where it is.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use regex::Regex;
use serde_json::Value;

/// Labels that Prometheus adds to what it reads.
const TARGET: [&str; 2] = ["instance", "job"];

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a pattern")
}

/// The names of all series that there can be, with the labels that each has.
fn served() -> BTreeMap<String, BTreeSet<String>> {
    let (series, label) = (
        regex(r"(?m)^([a-z_]+)(?:\{(.*)\})? [^ ]+$"),
        regex(r#"([a-z_]+)="(?:[^"\\]|\\.)*""#),
    );
    let mut names = BTreeMap::new();
    for found in series.captures_iter(&read("tests/golden/metrics.txt")) {
        let labels: &mut BTreeSet<String> = names.entry(found[1].to_owned()).or_default();
        let own = found.get(2).map_or("", |labels| labels.as_str());
        labels.extend(label.captures_iter(own).map(|found| found[1].to_owned()));
    }
    assert!(names.len() >= 50, "{names:#?}");
    names
}

/// What is asked for: every name of ours in `text`, with the labels that it is chosen by.
fn asked(text: &str) -> Vec<(String, BTreeSet<String>)> {
    let name = regex(r"\b((?:ringmail|process)_[a-z_]+)\b(?:\{([^}]*)\})?");
    let label = regex(r"([a-z_]+) *(?:=~|!~|!=|=)");
    let labels = |text: &str| label.captures_iter(text).map(|found| found[1].to_owned()).collect();
    let found = name.captures_iter(text);
    found
        .map(|found| {
            (
                found[1].to_owned(),
                labels(found.get(2).map_or("", |labels| labels.as_str())),
            )
        })
        .collect()
}

/// Every text under `key` in a JSON value.
fn texts<'a>(value: &'a Value, key: &str, into: &mut Vec<&'a str>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                match member {
                    Value::String(text) if name == key => into.push(text),
                    member => texts(member, key, into),
                }
            }
        }
        Value::Array(members) => members.iter().for_each(|member| texts(member, key, into)),
        _ => {}
    }
}

/// The queries of the dashboard, those of its variables included.
fn queries(dashboard: &Value) -> Vec<&str> {
    let mut all = Vec::new();
    texts(dashboard, "expr", &mut all);
    texts(&dashboard["templating"], "query", &mut all);
    all
}

#[test]
fn dashboard_and_alerts_ask_only_for_what_there_is() {
    let served = served();
    let dashboard: Value = serde_json::from_str(&read("deploy/grafana.json")).expect("JSON");
    let queries = queries(&dashboard).join("\n");
    for (file, text) in [("grafana.json", &queries), ("alerts.yml", &read("deploy/alerts.yml"))] {
        let asked = asked(text);
        assert!(asked.len() > 20, "{file}: {asked:?}");
        for (name, labels) in asked {
            let Some(own) = served.get(&name) else {
                panic!("{file} asks for {name}, which is not in tests/golden/metrics.txt");
            };
            for label in labels {
                assert!(
                    own.contains(&label) || TARGET.contains(&&*label),
                    "{file} chooses {name} by {label:?}, which it has not: {own:?}"
                );
            }
        }
    }
}

#[test]
fn the_dashboard_shows_every_metric_and_says_in_each_panel_what_it_is() {
    let dashboard: Value = serde_json::from_str(&read("deploy/grafana.json")).expect("JSON");
    let queries = queries(&dashboard).join("\n");
    // The age is shown, what is left out is no trouble, and every bucket stands for its histogram.
    let unshown = ["ringmail_epoch", "ringmail_probes_left_out_total"];
    let family = regex("_(bucket|sum|count)$");
    let shown: BTreeSet<String> = asked(&queries)
        .into_iter()
        .map(|(name, _)| family.replace(&name, "").into_owned())
        .collect();
    for name in served().keys() {
        let name = family.replace(name, "");
        assert!(
            shown.contains(&*name) || unshown.contains(&&*name),
            "no panel shows {name}"
        );
    }
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64()), "two panels have one id: {panel}");
        assert!(
            panel["title"].as_str().is_some_and(|title| !title.is_empty()),
            "{panel}"
        );
    }
}

#[test]
fn every_alert_says_what_it_is_what_it_means_and_what_to_run() {
    let alerts = read("deploy/alerts.yml");
    let rules: Vec<&str> = alerts.split("      - alert: ").skip(1).collect();
    assert!(rules.len() >= 15, "{}", rules.len());
    let tests = read("tests/alerts.yml");
    for rule in rules {
        let name = rule.lines().next().expect("a name");
        for part in ["expr:", "severity:", "summary:", "description:", "remedy:"] {
            assert!(rule.contains(part), "{name} has no {part}");
        }
        assert!(tests.contains(name), "no test of tests/alerts.yml makes {name}");
    }
}

/// Runs promtool in tests/ with this on its standard input.
fn promtool(arguments: &[&str], input: &str) {
    let program = std::env::var_os("PROMTOOL").unwrap_or_else(|| "promtool".into());
    let mut child = Command::new(&program)
        .args(arguments)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; it is in Debian's package prometheus", program.display()));
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(input.as_bytes()).expect("written");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
}

/// The same metrics in Prometheus' own, older form of text, which promtool reads: there the name of a counter's family
/// has its `_total` too.
fn classic(open: &str) -> String {
    let counters: BTreeSet<&str> = open
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let line = |line: &str| {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("UNIT"), ..) | (Some("#"), Some("EOF"), ..) => None,
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(name) => {
                Some(format!("# {what} {name}_total {rest}\n"))
            }
            _ => Some(format!("{line}\n")),
        }
    };
    open.lines().filter_map(line).collect()
}

#[test]
#[ignore = "needs promtool"]
fn promtool_finds_nothing_to_say_of_names_rules_and_alerts() {
    promtool(&["check", "metrics"], &classic(&read("tests/golden/metrics.txt")));
    promtool(&["check", "rules", "../deploy/alerts.yml"], "");
    promtool(&["test", "rules", "alerts.yml"], "");
}

#[test]
#[ignore = "needs promtool"]
fn promtool_understands_every_query_of_the_dashboard() {
    let dashboard: Value = serde_json::from_str(&read("deploy/grafana.json")).expect("JSON");
    let mut all = Vec::new();
    texts(&dashboard, "expr", &mut all);
    // Grafana fills its variables in.
    let rules: Vec<Value> = (all.iter().enumerate())
        .map(|(number, query)| {
            let filled = query.replace("$__rate_interval", "5m").replace("$__range", "1h");
            serde_json::json!({"record": format!("query{number}"), "expr": filled})
        })
        .collect();
    assert!(rules.len() > 30, "{}", rules.len());
    let file = std::env::temp_dir().join(format!("ringmail-queries-{}.json", std::process::id()));
    // JSON is YAML.
    let groups = serde_json::json!({"groups": [{"name": "dashboard", "rules": rules}]});
    std::fs::write(&file, groups.to_string()).expect("written");
    let path = file.to_str().expect("a path").to_owned();
    promtool(&["check", "rules", &path], "");
    std::fs::remove_file(&file).expect("removed");
}
