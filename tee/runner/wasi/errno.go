package wasi

import "fmt"

// errno is an error number of preview 1. Inside the package zero is no error; it is
// an error only on its way to the host.
type errno uint32

const (
	success      errno = 0
	eBADF        errno = 8
	eBUSY        errno = 10
	eEXIST       errno = 20
	eFAULT       errno = 21
	eFBIG        errno = 22
	eILSEQ       errno = 25
	eINVAL       errno = 28
	eIO          errno = 29
	eISDIR       errno = 31
	eLOOP        errno = 32
	eMFILE       errno = 33
	eNAMETOOLONG errno = 37
	eNOENT       errno = 44
	eNOSPC       errno = 51
	eNOSYS       errno = 52
	eNOTDIR      errno = 54
	eNOTEMPTY    errno = 55
	eNOTSOCK     errno = 57
	eNOTSUP      errno = 58
	ePERM        errno = 63
	eROFS        errno = 69
	eSPIPE       errno = 70
	eXDEV        errno = 75
	eNOTCAPABLE  errno = 76
)

func (e errno) Error() string { return fmt.Sprintf("wasi errno %d", uint32(e)) }

// rights are those of preview 1, one bit each.
type rights uint64

const (
	rightFDDatasync rights = 1 << iota
	rightFDRead
	rightFDSeek
	rightFDSetFlags
	rightFDSync
	rightFDTell
	rightFDWrite
	rightFDAdvise
	rightFDAllocate
	rightPathCreateDirectory
	rightPathCreateFile
	rightPathLinkSource
	rightPathLinkTarget
	rightPathOpen
	rightFDReaddir
	rightPathReadlink
	rightPathRenameSource
	rightPathRenameTarget
	rightPathFilestatGet
	rightPathSetSize
	rightPathSetTimes
	rightFDFilestatGet
	rightFDSetSize
	rightFDSetTimes
	rightPathSymlink
	rightPathRemoveDirectory
	rightPathUnlinkFile
	rightPoll
	rightSockShutdown
	rightSockAccept
)

// What applies to each type of file. Rights beyond these are not an error when a
// file is opened: they are not given.
const (
	allRights = rightSockAccept<<1 - 1

	fileRights = rightFDDatasync | rightFDRead | rightFDSeek | rightFDSetFlags | rightFDSync |
		rightFDTell | rightFDWrite | rightFDAdvise | rightFDAllocate | rightFDFilestatGet |
		rightFDSetSize | rightFDSetTimes | rightPoll

	dirRights = rightFDDatasync | rightFDSetFlags | rightFDSync | rightPathCreateDirectory |
		rightPathCreateFile | rightPathLinkSource | rightPathLinkTarget | rightPathOpen |
		rightFDReaddir | rightPathReadlink | rightPathRenameSource | rightPathRenameTarget |
		rightPathFilestatGet | rightPathSetSize | rightPathSetTimes | rightFDFilestatGet |
		rightFDSetTimes | rightPathSymlink | rightPathRemoveDirectory | rightPathUnlinkFile

	streamRights = rightFDSetFlags | rightFDFilestatGet | rightPoll
)

// fdflags.
const (
	flagAppend = 1 << iota
	flagDsync
	flagNonblock
	flagRsync
	flagSync
	allFlags = flagSync<<1 - 1
)
