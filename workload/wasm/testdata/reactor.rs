// A reactor in Rust.
use std::collections::BTreeMap;

static mut INPUT: [u8; 4096] = [0; 4096];
static mut SEEN: Option<BTreeMap<Vec<u8>, u64>> = None;

#[no_mangle]
pub extern "C" fn edgekeep_alloc(n: u32) -> *mut u8 {
    unsafe { if n as usize <= INPUT.len() { INPUT.as_mut_ptr() } else { std::ptr::null_mut() } }
}

#[no_mangle]
pub extern "C" fn edgekeep_batch(p: *const u8, n: u32) -> u64 {
    let b = unsafe { std::slice::from_raw_parts(p, n as usize) }.to_vec();
    let seen = unsafe { SEEN.get_or_insert_with(BTreeMap::new) };
    *seen.entry(b).or_insert(0) += 1;
    seen.iter().fold(7, |h, (k, v)| k.iter().fold(h * 31 + v, |h: u64, c| h.wrapping_mul(31) + *c as u64))
}
