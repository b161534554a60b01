//! rolling is a workload of the shape "reactor": it stays in memory, and a runner
//! calls its exports for every batch. It keeps the last readings of each series,
//! and after every so many readings of one writes NAME/mean, NAME/min, NAME/max
//! and NAME/sd (sample standard deviation, 0 for a single reading) of them, all
//! with the time and the unit of the newest. Batches are CSV: a line
//! name,time,value,unit and then one row a reading, without quotes.
//!
//!     rolling [--window N] [--every M]      defaults: 288 and 12
//!
//! The numbers are computed from the readings in the window each time, in two
//! passes, so no error adds up however long it runs.

use std::alloc::{alloc, Layout};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;

const HEADER: &str = "name,time,value,unit";
const MAX_BATCH: usize = 1 << 20; // bytes
const MAX_SERIES: usize = 64;
const MAX_WINDOW: usize = 4096; // readings
const MAX_FIELD: usize = 256; // bytes
const MAX_VALUE: f64 = 1e150; // squares of such still add up to a number

#[derive(Clone, Default)]
struct Series {
    window: VecDeque<f64>,
    since: usize, // readings since the last output
}

struct Rolling {
    size: usize,
    every: usize,
    series: BTreeMap<String, Series>,
}

struct Row<'a> {
    name: &'a str,
    time: &'a str,
    value: f64,
    unit: &'a str,
}

fn number(text: &str) -> Option<f64> {
    // Rust also reads "inf", "nan" and "+1".
    let plain = |c: char| c.is_ascii_digit() || "-+.eE".contains(c);
    if text.len() > 40 || !text.chars().all(plain) || text.starts_with('+') {
        return None;
    }
    text.parse().ok().filter(|v: &f64| v.abs() <= MAX_VALUE)
}

fn is_name(s: &str) -> bool {
    // RFC 8428, section 4.5.1
    let rest = |c: char| c.is_ascii_alphanumeric() || "-:./_".contains(c);
    s.len() <= MAX_FIELD && s.starts_with(|c: char| c.is_ascii_alphanumeric()) && s.chars().all(rest)
}

fn parse(line: &str) -> Result<Row, &'static str> {
    let mut fields = line.split(',');
    let mut next = || fields.next().ok_or("not four fields");
    let (name, time, value, unit) = (next()?, next()?, next()?, next()?);
    if fields.next().is_some() {
        return Err("not four fields");
    }
    if !is_name(name) {
        return Err("the first field is no name");
    }
    number(time).ok_or("the time is no number")?;
    let value = number(value).ok_or("the value is no number in range")?;
    if unit.len() > MAX_FIELD || unit.contains(|c: char| c == '"' || c.is_control()) {
        return Err("the unit is too long or has a quote");
    }
    Ok(Row { name, time, value, unit })
}

impl Rolling {
    /// What a batch says, checked whole before any of it counts.
    fn decode<'a>(&self, batch: &'a str) -> Result<Vec<Row<'a>>, String> {
        let mut lines = batch.lines();
        match lines.next() {
            None => return Ok(Vec::new()),
            Some(HEADER) => {}
            Some(_) => return Err(format!("line 1 of the batch: want {}", HEADER)),
        }
        let mut rows = Vec::new();
        let mut unseen: Vec<&str> = Vec::new();
        for (i, line) in lines.enumerate() {
            let row = parse(line).map_err(|e| format!("line {} of the batch: {}", i + 2, e))?;
            if !self.series.contains_key(row.name) && !unseen.contains(&row.name) {
                unseen.push(row.name);
            }
            if self.series.len() + unseen.len() > MAX_SERIES {
                return Err(format!("more than {} series: give the workload fewer streams", MAX_SERIES));
            }
            rows.push(row);
        }
        Ok(rows)
    }

    fn batch(&mut self, batch: &[u8]) -> Result<String, String> {
        let batch = std::str::from_utf8(batch).map_err(|e| format!("the batch is no UTF-8: {}", e))?;
        let mut out = String::new();
        for row in self.decode(batch)? {
            if !self.series.contains_key(row.name) {
                self.series.insert(row.name.to_string(), Series::default());
            }
            let series = self.series.get_mut(row.name).expect("it was just inserted");
            if series.window.len() == self.size {
                series.window.pop_front();
            }
            series.window.push_back(row.value);
            series.since += 1;
            if series.since == self.every {
                series.since = 0;
                series.write(&row, &mut out);
            }
        }
        if !out.is_empty() {
            out.insert_str(0, &format!("{}\n", HEADER));
        }
        Ok(out)
    }
}

impl Series {
    fn write(&self, row: &Row, out: &mut String) {
        let n = self.window.len() as f64;
        let mut mean = self.window.iter().sum::<f64>() / n;
        // The second pass takes the rounding of the first sum out of both.
        let rest = self.window.iter().map(|v| v - mean).sum::<f64>() / n;
        let squares: f64 = self.window.iter().map(|v| (v - mean - rest).powi(2)).sum();
        mean += rest;
        let sd = if n > 1.0 { (squares / (n - 1.0)).sqrt() } else { 0.0 };
        let min = self.window.iter().copied().fold(f64::INFINITY, f64::min);
        let max = self.window.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for (what, v) in [("mean", mean), ("min", min), ("max", max), ("sd", sd)] {
            writeln!(out, "{}/{},{},{:?},{}", row.name, what, row.time, v, row.unit).expect("a string has room");
        }
    }
}

fn arguments() -> Result<(usize, usize), String> {
    let (mut size, mut every) = (288, 12);
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let to = match name.as_str() {
            "--window" => &mut size,
            "--every" => &mut every,
            _ => return Err("arguments are [--window N] [--every M]".to_string()),
        };
        *to = args.next().and_then(|v| v.parse().ok()).ok_or(format!("{} wants a number", name))?;
        if *to < 1 || *to > MAX_WINDOW {
            return Err(format!("{} wants a number from 1 to {}", name, MAX_WINDOW));
        }
    }
    Ok((size, every))
}

// --- the exports ------------------------------------------------------------

static mut ROLLING: Option<Rolling> = None;
static mut INPUT: *mut u8 = std::ptr::null_mut();
static mut OUTPUT: String = String::new();

extern "C" {
    fn __wasm_call_ctors();
}

/// Called once, first. Without it the linker would call the constructors of the C
/// library again with every export.
#[no_mangle]
pub unsafe extern "C" fn _initialize() {
    __wasm_call_ctors();
    match arguments() {
        Ok((size, every)) => ROLLING = Some(Rolling { size, every, series: BTreeMap::new() }),
        Err(e) => {
            eprintln!("rolling: {}", e);
            std::process::exit(2);
        }
    }
}

/// Room for a batch, the same for each; null when there would not be enough.
#[no_mangle]
pub unsafe extern "C" fn edgekeep_alloc(size: usize) -> *mut u8 {
    if size > MAX_BATCH {
        return std::ptr::null_mut();
    }
    if INPUT.is_null() {
        INPUT = alloc(Layout::from_size_align_unchecked(MAX_BATCH, 16));
    }
    INPUT
}

/// Pointer and length of the output, -1 when the batch failed.
#[no_mangle]
pub unsafe extern "C" fn edgekeep_batch(ptr: *const u8, len: usize) -> i64 {
    let input: &[u8] = if len == 0 {
        &[]
    } else if !INPUT.is_null() && ptr == INPUT as *const u8 && len <= MAX_BATCH {
        std::slice::from_raw_parts(ptr, len)
    } else {
        eprintln!("rolling: the batch is not where edgekeep_alloc said");
        return -1;
    };
    match ROLLING.as_mut().map(|r| r.batch(input)) {
        Some(Ok(out)) => OUTPUT = out,
        Some(Err(e)) => {
            eprintln!("rolling: {}", e);
            return -1;
        }
        None => {
            eprintln!("rolling: _initialize was not called");
            return -1;
        }
    }
    if OUTPUT.is_empty() {
        return 0;
    }
    (OUTPUT.as_ptr() as i64) << 32 | OUTPUT.len() as i64
}
