// Package durable holds everything this program knows about making bytes
// survive a crash: a segmented, checksummed log with group commit (Log), and
// the atomic replacement of a small file (WriteFile). Above each function that
// changes the disk stands the sequence of system calls it makes.
//
// # Files
//
// A log is one directory, used by one process at a time:
//
//	lock                      empty, held with flock(LOCK_EX)
//	trimmed                   the mark: entries up to here are no longer needed
//	00000000000000000001.seg  a segment, named by the index of its first entry
//
// All integers are big-endian, every CRC is CRC-32C (Castagnoli).
//
//	segment = header group*
//	header  = "EKSG" | version u32 = 1 | first u64 | marker [8] | crc u32
//	group   = marker [8] | entry+
//	entry   = len u32 | crc u32 | index u64 | data [len]
//	mark    = "EKTM" | version u32 = 1 | trimmed u64 | crc u32
//
// The crc of a header and of a mark covers the bytes before it and stands in
// this place in every version to come. The crc of an entry covers len, index
// and data. Len is 1 to 1,048,576. Indices start at 1, have no gaps within and
// between segments, and go on after a trim and a restart. The marker is random
// per segment, and its top bit is set, so that it is never mistaken for a len.
//
// A group is what one write and one fdatasync made durable. A group is written
// only after the fdatasync of the group before it (or, for the first one, of
// the header and of the directory) has returned without an error.
//
// # Recovery
//
// Open reads and checks everything. What it finds damaged is one of two things:
//
//   - A torn tail: a write that nobody was told about. After a power cut the
//     pages of such a group may have reached the disk in any order, so a good
//     entry may follow a bad one within the group.
//   - Corruption of entries that were acknowledged. Open fails with ErrCorrupt,
//     names the file and the offset, and changes nothing there.
//
// The rule that tells them apart: damage is a torn tail if and only if it is in
// the last segment, no marker follows it, and the first bad index is above the
// mark. A marker that follows proves that the damaged group had been synced.
// Its 63 random bits never leave the directory, so whoever chooses the contents
// of entries cannot forge one. The tail is cut off behind the last good entry
// before the first bad one. Likewise, a last segment with a bad header is the
// torn creation of a file if it is no longer than a header, else corruption.
//
// An append that was never acknowledged (crash, error) may thus be found later
// in whole, as a prefix of its entries, or not at all; an acknowledged one
// whole. Open syncs what it found before it shows it to anybody, and writes the
// last group once more: after a failed fdatasync its pages can be clean in the
// page cache without ever having reached the disk.
//
// # Not solved
//
//   - Damage to the very last group after it was acknowledged (a decayed
//     sector) looks like a torn tail and is cut off. Recovered tells.
//   - A disk that loses what it said it had flushed. Where this leaves a gap or
//     a log that ends before its mark, Open reports ErrCorrupt.
//   - After a failed fsync of a directory the log refuses further work, but a
//     reopening process cannot write a directory again as it can a file.
//   - Someone who can write to the directory. CRCs are no authentication.
//   - flock is not reliable on every network file system: use a local one.
package durable
