package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud/client"
	"edgekeep/workload"
	"edgekeep/workload/pack"
	"edgekeep/workload/wasm"
)

const (
	bundleSuffix = ".ekw"
	keySuffix    = ".key"
)

func (a *app) workloadPack() *cobra.Command {
	var manifest, out string
	c := &cobra.Command{
		Use: "pack DIR|FILE.wasm", Short: "Check a workload, encrypt it and sign its manifest", Args: cobra.ExactArgs(1),
		Long: "Reads DIR/workload.toml (or --manifest), the module and the models that it names, refuses\n" +
			"a module whose state could not be captured, encrypts all of it under a new key, and\n" +
			"signs the manifest with the kit's operator key. Writes NAME-VERSION.ekw, which can go\n" +
			"anywhere, and NAME-VERSION.key: who has both can read module and models.",
		RunE: func(_ *cobra.Command, args []string) error { return a.pack(args[0], manifest, out) },
	}
	c.Flags().StringVar(&manifest, "manifest", "", "manifest; workload.toml beside the module if not given")
	c.Flags().StringVarP(&out, "out", "o", "", "bundle to write; NAME-VERSION.ekw if not given, and the key beside it")
	return c
}

func (a *app) pack(path, manifest, out string) error {
	src, err := pack.Read(path, manifest)
	if err != nil {
		return err
	}
	kit, err := client.LoadKit(a.kit)
	if err != nil {
		return fmt.Errorf("%w\nthe operator's kit signs bundles: name it with --kit or EDGEKEEP_KIT", err)
	}
	operator, err := kit.Signer("operator.key")
	if err != nil {
		return err
	}
	key := make([]byte, workload.KeySize)
	rand.Read(key) // never fails
	b, m, err := src.Pack(key, operator)
	if err != nil {
		return err
	}
	if out == "" {
		out = m.Name + "-" + m.Version + bundleSuffix
	}
	keyFile := keyOf(out)
	if err := writeBoth(out, b.Marshal(), keyFile, key); err != nil {
		return err
	}
	return a.print(packedJSON(src, b, m, out, keyFile), func(w io.Writer) { printPacked(w, src, b, m, out, keyFile) })
}

// keyOf is where the key of a bundle is, if nobody says otherwise.
func keyOf(bundle string) string { return strings.TrimSuffix(bundle, bundleSuffix) + keySuffix }

// writeBoth writes a bundle and its key. It replaces neither: a key that is gone
// takes what it opens with it.
func writeBoth(out string, bundle []byte, keyFile string, key []byte) error {
	for _, f := range []string{out, keyFile} {
		if _, err := os.Lstat(f); err == nil {
			return fmt.Errorf("%s is there already: raise the version, remove it, or name another with --out", f)
		}
	}
	if err := writeNew(keyFile, key, 0o600); err != nil {
		return fmt.Errorf("writing the key: %w", err)
	}
	if err := writeNew(out, bundle, 0o644); err != nil {
		return errors.Join(fmt.Errorf("writing the bundle: %w", err), os.Remove(keyFile))
	}
	return nil
}

func writeNew(path string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

func packedJSON(s pack.Source, b pack.Bundle, m workload.Manifest, out, keyFile string) map[string]any {
	v := manifestJSON(m)
	v["bundle"] = hex.EncodeToString(workload.ID(b.Manifest))
	v["rewritten_sha256"], v["rewriter"] = hex.EncodeToString(s.Rewritten), wasm.Version
	v["imports"], v["globals"], v["memory_min"] = orEmpty(s.Info.Imports), len(s.Info.Globals), uint64(s.Info.MemoryMin)<<16
	v["file"], v["key_file"], v["file_size"] = out, keyFile, len(b.Marshal())
	return v
}

func printPacked(w io.Writer, s pack.Source, b pack.Bundle, m workload.Manifest, out, keyFile string) {
	fmt.Fprintf(w, "Packed %s %s, a %s.\n\n", m.Name, m.Version, m.Shape)
	fmt.Fprintf(w, "  bundle    %x\n", workload.ID(b.Manifest))
	printManifest(w, m)
	fmt.Fprintf(w, "  runs as   %x, by version %s of the rules; mutable globals captured: %d\n", s.Rewritten, wasm.Version, len(s.Info.Globals))
	fmt.Fprintf(w, "  imports   %s\n", importsText(s.Info.Imports))
	fmt.Fprintf(w, "\nWrote %s (%s, encrypted) and %s.\n", out, bytesText(uint64(len(b.Marshal()))), keyFile)
	fmt.Fprintf(w, "The key opens the bundle: who has it can read the bundle. Keep it like the operator's key.\n")
	fmt.Fprintf(w, "Next: edgekeep workload deploy GATEWAY %s\n", out)
}

// manifestJSON is what a manifest says.
func manifestJSON(m workload.Manifest) map[string]any {
	models := []map[string]any{}
	for _, f := range m.Models {
		models = append(models, map[string]any{"name": f.Name, "sha256": hex.EncodeToString(f.Hash), "size": f.Size})
	}
	return map[string]any{
		"name": m.Name, "version": m.Version, "shape": m.Shape, "args": orEmpty(m.Args),
		"module_sha256": hex.EncodeToString(m.Module), "module_size": m.ModuleSize, "models": models,
		"input":  map[string]any{"format": m.Input.Format, "streams": orEmpty(m.Input.Streams), "batch": m.Input.Batch, "wait_ms": m.Input.Wait},
		"output": m.Output,
		"limits": map[string]any{"memory": m.Limits.Memory, "cpu_ms": m.Limits.CPU, "disk": m.Limits.Disk, "output": m.Limits.Output},
		"nodes":  m.Nodes, "moves": m.Moves, "assurance": m.Assurance, "commit_ms": m.Commit, "checkpoint_s": m.Checkpoint,
		"content": hex.EncodeToString(m.Content), "content_size": m.ContentSize,
	}
}

func printManifest(w io.Writer, m workload.Manifest) {
	fmt.Fprintf(w, "  module    %x, %s\n", m.Module, bytesText(uint64(m.ModuleSize)))
	for _, f := range m.Models {
		fmt.Fprintf(w, "  model     %x, %s, %s\n", f.Hash, bytesText(uint64(f.Size)), f.Name)
	}
	fmt.Fprintf(w, "  reads     %s\n", inputText(m))
	fmt.Fprintf(w, "  may use   %s of memory, %s of files; for each batch %s and %s of results\n",
		bytesText(m.Limits.Memory), bytesText(m.Limits.Disk), millis(m.Limits.CPU), bytesText(m.Limits.Output))
	fmt.Fprintf(w, "  may run   on %s with assurance %q or better; may move %d times\n", nodesText(m.Nodes), m.Assurance, m.Moves)
	fmt.Fprintf(w, "  commits   every %s at most; %s\n", millis(m.Commit), checkpointText(m.Checkpoint))
}

func inputText(m workload.Manifest) string {
	if len(m.Input.Streams) == 0 {
		return fmt.Sprintf("no stream; answers requests in %s with %s", m.Input.Format, m.Output)
	}
	return fmt.Sprintf("%s as %s, at most %d readings or %s at once; writes %s",
		strings.Join(m.Input.Streams, ", "), m.Input.Format, m.Input.Batch, millis(m.Input.Wait), m.Output)
}

func nodesText(nodes []string) string {
	if slices.Contains(nodes, "*") {
		return "any gateway"
	}
	return strings.Join(nodes, ", ")
}

func checkpointText(seconds int64) string {
	if seconds == 0 {
		return "no checkpoints in the cloud: a lost gateway takes its state with it"
	}
	return fmt.Sprintf("a checkpoint goes to the cloud every %s", time.Duration(seconds)*time.Second)
}

func importsText(imports []string) string {
	if len(imports) == 0 {
		return "none"
	}
	var names []string
	for _, i := range imports { // all of one module: see package wasm
		_, name, _ := strings.Cut(i, ".")
		names = append(names, name)
	}
	return fmt.Sprintf("%d functions of WASI preview 1: %s", len(imports), strings.Join(names, " "))
}

func millis(ms int64) string { return (time.Duration(ms) * time.Millisecond).String() }

// bytesText is a size for a person.
func bytesText(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if f >= 10 || f == float64(uint64(f)) {
		return fmt.Sprintf("%.0f %s", f, units[i])
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}
