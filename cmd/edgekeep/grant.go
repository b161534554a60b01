package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"edgekeep/cloud"
	"edgekeep/cloud/client"
	"edgekeep/internal/cose"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
)

func (a *app) dataGrant() *cobra.Command {
	var out string
	var expires time.Duration
	var gateway bool
	c := &cobra.Command{
		Use: "grant NAME", Short: "Grant reading, as the data owner: to a new consumer, or to a gateway", Args: cobra.ExactArgs(1),
		Long: "Makes a key pair for a consumer in --output and signs, with the data owner's key from\n" +
			"the kit, that it may read. With --gateway NAME is a gateway, which reads with the\n" +
			"receiving key in its verdict. File the grant in the cloud under tenants/TENANT/grants.",
		RunE: func(_ *cobra.Command, args []string) error {
			g := message.Grant{Consumer: args[0], Gateway: gateway}
			if expires > 0 {
				g.Expires = time.Now().Add(expires).Unix()
			}
			return a.grant(g, out)
		},
	}
	c.Flags().StringVarP(&out, "output", "o", "new-consumer", "directory for key and grant")
	c.Flags().DurationVar(&expires, "expires", 0, "the grant ends after this time; 0: never")
	c.Flags().BoolVar(&gateway, "gateway", false, "NAME is a gateway")
	return c
}

// grant signs a grant, and makes the consumer's key if it is a consumer's.
func (a *app) grant(g message.Grant, out string) error {
	if !attest.ValidName(g.Consumer) {
		return fmt.Errorf("%q cannot be a name: 1 to 31 letters, digits and hyphens", g.Consumer)
	}
	kit, err := client.LoadKit(a.kit)
	if err != nil {
		return err
	}
	owner, err := kit.Signer("owner.key")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o700); err != nil {
		return fmt.Errorf("making %s: %w", out, err)
	}
	g.Tenant = kit.Tenant
	file, next := "gateway-"+g.Consumer+".cbor", ""
	if !g.Gateway {
		key, err := cloud.NewHPKEKey(filepath.Join(out, "consumer.key"), false)
		if err != nil {
			return err
		}
		g.Key, file = cose.MarshalHPKEKey(key.PublicKey()), g.Consumer+".cbor"
		next = fmt.Sprintf("; the consumer's kit needs %s/consumer.key, %s/grant.cbor (a copy, for inference), and consumer = %q in kit.toml", out, out, g.Consumer)
	}
	msg, err := g.Sign(owner)
	if err != nil {
		return err
	}
	path := filepath.Join(out, file)
	files := []string{path}
	if !g.Gateway {
		files = append(files, filepath.Join(out, "grant.cbor"))
	}
	for _, f := range files {
		if err := os.WriteFile(f, msg, 0o644); err != nil {
			return fmt.Errorf("writing the grant: %w", err)
		}
	}
	return a.print(map[string]any{"name": g.Consumer, "gateway": g.Gateway, "grant": path}, func(w io.Writer) {
		fmt.Fprintf(w, "Signed the grant %s.\nNext: copy it to tenants/%s/grants/ of the cloud%s.\n", path, kit.Tenant, next)
	})
}
