// A Rust guest that uses std::fs, and tells on stdout how it went.
use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

fn main() -> io::Result<()> {
    fs::create_dir_all("/a/b")?;
    fs::write("/a/b/f", "content")?;
    assert_eq!(fs::read_to_string("/a/b/f")?, "content");
    let mut f = fs::OpenOptions::new().create(true).read(true).write(true).open("/rw")?;
    f.write_all(b"0123456789")?;
    f.seek(SeekFrom::Start(4))?;
    let mut s = String::new();
    f.read_to_string(&mut s)?;
    assert_eq!(s, "456789");
    f.set_len(3)?;
    f.sync_all()?;
    assert_eq!(f.metadata()?.len(), 3);
    fs::OpenOptions::new().append(true).open("/rw")?.write_all(b"end")?;
    assert_eq!(fs::read("/rw")?, b"012end");
    fs::hard_link("/rw", "/hard")?;
    fs::rename("/a/b", "/moved")?;
    assert_eq!(fs::copy("/moved/f", "/copy")?, 7);
    let mut names: Vec<_> = fs::read_dir("/")?.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["a", "copy", "hard", "moved", "rw"]);
    assert_eq!(fs::metadata("/none").unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(fs::create_dir("/a").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert!(fs::File::open("/../outside").is_err());
    assert_eq!(fs::read("/models/m")?, b"model");
    assert!(fs::write("/models/m", "x").is_err());
    fs::remove_dir_all("/moved")?;
    fs::remove_file("/copy")?;
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(2));
    assert!(start.elapsed() > Duration::ZERO);
    let map: std::collections::HashMap<u8, u8> = [(1, 2)].into(); // takes randomness
    assert_eq!(map[&1], 2);
    let mut input = String::new();
    io::stdin().read_to_string(&mut input)?;
    println!("{} {}", std::env::args().nth(1).unwrap(), input);
    Ok(())
}
