package wasi

import (
	"context"
	"fmt"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
)

const moduleName = "wasi_snapshot_preview1"

// function is one function of the module: its parameters, "i" for an i32 and "I" for
// an i64, and what it does.
type function struct {
	name, params string
	do           func(*System, *call) errno
}

var functions = []function{
	{"args_get", "ii", (*System).argsGet},
	{"args_sizes_get", "ii", (*System).argsSizesGet},
	{"environ_get", "ii", (*System).environGet},
	{"environ_sizes_get", "ii", (*System).environSizesGet},
	{"clock_res_get", "ii", (*System).clockResGet},
	{"clock_time_get", "iIi", (*System).clockTimeGet},
	{"fd_advise", "iIIi", (*System).fdAdvise},
	{"fd_allocate", "iII", (*System).fdAllocate},
	{"fd_close", "i", (*System).fdClose},
	{"fd_datasync", "i", (*System).fdDatasync},
	{"fd_fdstat_get", "ii", (*System).fdFdstatGet},
	{"fd_fdstat_set_flags", "ii", (*System).fdFdstatSetFlags},
	{"fd_fdstat_set_rights", "iII", (*System).fdFdstatSetRights},
	{"fd_filestat_get", "ii", (*System).fdFilestatGet},
	{"fd_filestat_set_size", "iI", (*System).fdFilestatSetSize},
	{"fd_filestat_set_times", "iIIi", (*System).fdFilestatSetTimes},
	{"fd_pread", "iiiIi", (*System).fdPread},
	{"fd_prestat_get", "ii", (*System).fdPrestatGet},
	{"fd_prestat_dir_name", "iii", (*System).fdPrestatDirName},
	{"fd_pwrite", "iiiIi", (*System).fdPwrite},
	{"fd_read", "iiii", (*System).fdRead},
	{"fd_readdir", "iiiIi", (*System).fdReaddir},
	{"fd_renumber", "ii", (*System).fdRenumber},
	{"fd_seek", "iIii", (*System).fdSeek},
	{"fd_sync", "i", (*System).fdSync},
	{"fd_tell", "ii", (*System).fdTell},
	{"fd_write", "iiii", (*System).fdWrite},
	{"path_create_directory", "iii", (*System).pathCreateDirectory},
	{"path_filestat_get", "iiiii", (*System).pathFilestatGet},
	{"path_filestat_set_times", "iiiiIIi", (*System).pathFilestatSetTimes},
	{"path_link", "iiiiiii", (*System).pathLink},
	{"path_open", "iiiiiIIii", (*System).pathOpen},
	{"path_readlink", "iiiiii", (*System).pathReadlink},
	{"path_remove_directory", "iii", (*System).pathRemoveDirectory},
	{"path_rename", "iiiiii", (*System).pathRename},
	{"path_symlink", "iiiii", (*System).pathSymlink},
	{"path_unlink_file", "iii", (*System).pathUnlinkFile},
	{"poll_oneoff", "iiii", (*System).pollOneoff},
	{"proc_raise", "i", (*System).procRaise},
	{"random_get", "ii", (*System).randomGet},
	{"sched_yield", "", (*System).schedYield},
	{"sock_accept", "iii", (*System).notSocket},
	{"sock_recv", "iiiiii", (*System).notSocket},
	{"sock_send", "iiiii", (*System).notSocket},
	{"sock_shutdown", "ii", (*System).notSocket},
}

// Instantiate gives the runtime the module wasi_snapshot_preview1 with s behind it.
// A guest that calls proc_exit ends with a [sys.ExitError].
func (s *System) Instantiate(ctx context.Context, r wazero.Runtime) error {
	b := r.NewHostModuleBuilder(moduleName)
	for _, f := range functions {
		export(b, f.name, f.params, []api.ValueType{api.ValueTypeI32}, func(c *call, stack []uint64) {
			stack[0] = uint64(f.do(s, c))
		})
	}
	export(b, "proc_exit", "i", nil, func(c *call, _ []uint64) { c.exit(c.u32(0)) })
	if _, err := b.Instantiate(ctx); err != nil {
		return fmt.Errorf("instantiate %s: %w", moduleName, err)
	}
	return nil
}

func export(b wazero.HostModuleBuilder, name, params string, results []api.ValueType, do func(*call, []uint64)) {
	types := make([]api.ValueType, len(params))
	for i, p := range params {
		types[i] = api.ValueTypeI32
		if p == 'I' {
			types[i] = api.ValueTypeI64
		}
	}
	b.NewFunctionBuilder().WithGoModuleFunction(api.GoModuleFunc(
		func(ctx context.Context, m api.Module, stack []uint64) {
			do(&call{ctx: ctx, module: m, memory: m.ExportedMemory("memory"), args: stack}, stack)
		}), types, results).Export(name)
}
