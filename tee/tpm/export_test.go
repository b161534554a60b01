package tpm

// What the tests of whole evidence, which are outside the package because package attest
// imports it, share with those inside.
var (
	OpenShared   = open
	ExtendShared = extend
	Measured     = measured
)
