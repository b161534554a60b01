package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"edgekeep/testbench/demo"
)

func (a *app) demoCommand() *cobra.Command {
	var o demo.Options
	var seconds int
	c := &cobra.Command{
		Use: "demo", Short: "Run cloud, gateway and drivers on this machine, and watch them", Args: cobra.NoArgs,
		Long: "Starts a cloud and a gateway with a software TPM as separate processes in one directory,\n" +
			"seals what drivers read, opens it as a consumer, and searches for a canary in all that\n" +
			"should be sealed. There is no measured boot here: the demo plays the firmware, extends\n" +
			"PCRs with the digests of the programs, and says so.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			exe, err := os.Executable()
			if err != nil {
				return fmt.Errorf("looking for the other programs: %w", err)
			}
			o.Bin, o.For = filepath.Dir(exe), time.Duration(seconds)*time.Second
			if f, ok := a.out.(*os.File); ok && !a.json {
				if w, _, err := term.GetSize(int(f.Fd())); err == nil && term.IsTerminal(int(f.Fd())) {
					o.Screen, o.Width = true, w
				}
			}
			if o.Broker != "nats" && o.Broker != "mosquitto" {
				return fmt.Errorf("--broker %s: nats or mosquitto", o.Broker)
			}
			return demo.Run(cmd.Context(), o, a.out)
		},
	}
	c.Flags().StringVar(&o.Dir, "dir", "", "directory for everything; a new temporary one if not given")
	c.Flags().IntVar(&seconds, "seconds", 0, "end after so many seconds; 0: at Ctrl-C")
	c.Flags().StringVar(&o.Broker, "broker", "nats", "nats (in the cloud process) or mosquitto (through the bridge)")
	return c
}
