//! Tables and numbers for people. What comes from a store or the kernel is cleaned before it reaches a terminal.

use std::time::Duration;

/// How to print.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Style {
    /// Whether colours are wanted.
    pub(super) colour: bool,
}

/// A colour with a meaning.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tone {
    Plain,
    Good,
    Doubtful,
    Bad,
}

impl Style {
    /// `text` in the colour of `tone`.
    pub(super) fn paint(self, text: &str, tone: Tone) -> String {
        let code = match tone {
            Tone::Plain => None,
            Tone::Good => Some("32"),
            Tone::Doubtful => Some("33"),
            Tone::Bad => Some("31"),
        };
        match code.filter(|_| self.colour) {
            Some(code) => format!("\x1b[{code}m{text}\x1b[0m"),
            None => text.to_owned(),
        }
    }
}

/// The columns that a text for people keeps to.
pub(super) const WIDTH: usize = 80;

/// Where a column's cells stand.
#[derive(Clone, Copy, Debug)]
pub(super) enum Align {
    Left,
    Right,
}

/// A line of the table, or one below it that takes the whole width.
enum Row {
    Cells(Vec<(String, Tone)>),
    Note(String),
}

/// A table whose columns are as wide as their widest cell, two spaces apart.
pub(super) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Row>,
}

impl Table {
    pub(super) fn new(columns: impl IntoIterator<Item = (&'static str, Align)>) -> Self {
        Self {
            columns: columns.into_iter().collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row of as many cells as there are columns.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = (String, Tone)>) {
        let cells = cells.into_iter().map(|(text, tone)| (clean(&text, false), tone));
        self.rows.push(Row::Cells(cells.collect()));
    }

    /// Adds a text below the last row, indented and wrapped.
    pub(super) fn note(&mut self, text: &str) {
        self.rows.push(Row::Note(wrap(&clean(text, false), 4)));
    }

    pub(super) fn render(&self, style: Style) -> String {
        let mut widths: Vec<usize> = self.columns.iter().map(|(name, _)| name.len()).collect();
        for row in &self.rows {
            let Row::Cells(cells) = row else { continue };
            for (width, (text, _)) in widths.iter_mut().zip(cells) {
                *width = (*width).max(text.chars().count());
            }
        }
        let line = |cells: &[(String, Tone)]| {
            let mut line = String::new();
            for (at, ((text, tone), (width, (_, align)))) in
                cells.iter().zip(widths.iter().zip(&self.columns)).enumerate()
            {
                let gap = " ".repeat(width - text.chars().count());
                let painted = style.paint(text, *tone);
                let between = if at == 0 { "" } else { "  " };
                line += &match align {
                    Align::Left => format!("{between}{painted}{gap}"),
                    Align::Right => format!("{between}{gap}{painted}"),
                };
            }
            format!("{}\n", line.trim_end())
        };
        let head: Vec<_> = self
            .columns
            .iter()
            .map(|(name, _)| ((*name).to_owned(), Tone::Plain))
            .collect();
        let mut text = line(&head);
        for row in &self.rows {
            match row {
                Row::Cells(cells) => text += &line(cells),
                Row::Note(note) => text += note,
            }
        }
        text
    }
}

/// `text` in lines of at most [`WIDTH`] columns where its words allow it, each `indent` spaces in.
pub(super) fn wrap(text: &str, indent: usize) -> String {
    wrap_to(text, indent, WIDTH)
}

/// The same in lines of at most `width` columns.
pub(super) fn wrap_to(text: &str, indent: usize, width: usize) -> String {
    let mut lines = String::new();
    let mut column = 0;
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let length = word.chars().count();
        if column > 0 && column + 1 + length <= width {
            lines.push(' ');
            column += 1 + length;
        } else {
            if column > 0 {
                lines.push('\n');
            }
            lines += &" ".repeat(indent);
            column = indent + length;
        }
        lines += word;
    }
    lines.push('\n');
    lines
}

/// `text` without what a terminal would obey: whoever writes to the store may have written it.
pub(super) fn clean(text: &str, keep_lines: bool) -> String {
    let harmless = |c: char| (c == '\n' && keep_lines) || !c.is_control();
    text.chars().map(|c| if harmless(c) { c } else { '\u{fffd}' }).collect()
}

/// A time span in one unit: `0.4 s`, `12 s`, `45 min`, `3 h`, `9 d`.
pub(super) fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0 => format!("{:.1} s", (span.as_secs_f64() * 10.0).floor() / 10.0),
        1..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// An amount of bytes with a binary unit: `17 B`, `1.2 KiB`, `3.4 GiB`.
pub(super) fn bytes(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut amount = bytes as f64 / 1024.0;
    let mut unit = units[0];
    for next in &units[1..] {
        // What would be rounded to 1024.0 is 1.0 of the next.
        if amount < 1023.95 {
            break;
        }
        amount /= 1024.0;
        unit = next;
    }
    format!("{amount:.1} {unit}")
}

/// `1 peer`, `2 peers`.
pub(super) fn count(number: usize, noun: &str) -> String {
    if number == 1 {
        format!("{number} {noun}")
    } else {
        format!("{number} {noun}s")
    }
}
