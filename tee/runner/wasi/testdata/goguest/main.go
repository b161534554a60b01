// A Go guest that uses package os in all its directory, and tells on stdout how it
// went.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
)

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func want(ok bool, what string) {
	if !ok {
		panic("not so: " + what)
	}
}

func main() {
	must(os.MkdirAll("/a/b/c", 0o755))
	must(os.WriteFile("/a/b/c/f", []byte("content"), 0o644))
	b, err := os.ReadFile("/a/b/c/f")
	must(err)
	want(string(b) == "content", "what was written is read")
	f, err := os.OpenFile("/log", os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o644)
	must(err)
	for i := range 3 {
		fmt.Fprintln(f, i)
	}
	_, err = f.Seek(2, io.SeekStart)
	must(err)
	b, err = io.ReadAll(f)
	must(err)
	want(string(b) == "1\n2\n", "seek and read")
	must(f.Truncate(2))
	must(f.Sync())
	must(f.Close())
	must(os.Rename("/a/b", "/moved"))
	must(os.Symlink("moved/c/f", "/link"))
	must(os.Link("/link", "/hard"))
	b, err = os.ReadFile("/link")
	must(err)
	want(string(b) == "content", "through a link")
	var names []string
	must(fs.WalkDir(os.DirFS("/"), ".", func(path string, _ fs.DirEntry, err error) error {
		names = append(names, path)
		return err
	}))
	want(strings.Join(names, " ") == ". a hard link log moved moved/c moved/c/f", "walk: "+strings.Join(names, " "))
	when := time.Unix(1000, 500)
	must(os.Chtimes("/log", when, when))
	st, err := os.Stat("/log")
	must(err)
	want(st.Size() == 2 && st.ModTime().Equal(when), "size and time")
	_, err = os.Stat("/none")
	want(errors.Is(err, fs.ErrNotExist), "no such file")
	_, err = os.OpenFile("/log", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	want(errors.Is(err, fs.ErrExist), "exclusive")
	_, err = os.ReadFile("../../outside")
	want(err != nil, "there is no outside")
	b, err = os.ReadFile("/models/m")
	must(err)
	want(string(b) == "model", "model")
	want(os.WriteFile("/models/m", nil, 0o644) != nil, "models are read-only")
	must(os.RemoveAll("/moved"))
	ticked := make(chan bool)
	go func() { time.Sleep(3 * time.Millisecond); close(ticked) }()
	<-ticked
	in, err := io.ReadAll(os.Stdin)
	must(err)
	fmt.Printf("%s %s %s\n", os.Args[1], os.Getenv("NAME"), bytes.ToUpper(in))
}
