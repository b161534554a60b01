// Package mosquitto holds the configuration for Mosquitto as it is shipped:
// comments, paths and all. The test bench starts a broker from these very files,
// with other paths and ports, so that what is tested is what is installed.
package mosquitto

import _ "embed" // for the files

// Conf is mosquitto.conf: a listener for clients with a certificate, confined by
// ACL, and one for boxes that are not enrolled yet, confined by BootACL.
//
//go:embed mosquitto.conf
var Conf string

// ACL is the acl_file of the listener for clients with a certificate.
//
//go:embed acl
var ACL string

// BootACL is the acl_file of the listener for boxes that are not enrolled yet.
//
//go:embed acl-boot
var BootACL string
