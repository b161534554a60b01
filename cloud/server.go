package cloud

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"edgekeep/mqtt"
	"edgekeep/tee/attest"
)

// ServerConfig configures the embedded server.
type ServerConfig struct {
	Dir        string // where everything is stored
	Host       string
	ClientPort int // for the CLI and consumers; -1: any free port
	MQTTPort   int // for gateways; -1: any free port; 0: none
	Cert, Key  string
	ClientCA   string // PEM file: who certifies gateways and people
	StoreLimit int64  // bytes
}

// Server is an embedded NATS server that speaks MQTT, syncs every commit to
// disk, and lets everyone do only what their certificate says.
type Server struct {
	srv     *server.Server
	pool    *x509.CertPool
	issuer  nkeys.KeyPair
	secret  string
	nc      *nats.Conn
	stop    context.CancelFunc
	revoked atomic.Pointer[RevokedFunc]
}

// RevokedFunc says whether a gateway's certificate is not good any more.
type RevokedFunc func(ctx context.Context, tenant, gateway string, serial []byte) bool

// SetRevoked sets what is asked at every connection of a gateway. Until it is
// set, no gateway gets in.
func (s *Server) SetRevoked(f RevokedFunc) { s.revoked.Store(&f) }

// Roles that a certificate's organizational unit names.
const (
	RoleGateway  = "gateway"  // CN tenant/gateway
	RoleOperator = "operator" // CN tenant/name
	RoleConsumer = "consumer" // CN tenant/name
	RoleMonitor  = "monitor"  // CN monitor: sees every message, which is all sealed or signed
	RoleBridge   = "bridge"   // CN bridge: at another broker
)

const serviceUser, authUser = "edgekeep-service", "edgekeep-auth"

// StartServer starts the server and waits until it answers.
func StartServer(cfg ServerConfig) (*Server, error) {
	cert, err := tls.LoadX509KeyPair(cfg.Cert, cfg.Key)
	if err != nil {
		return nil, fmt.Errorf("the server's certificate: %w", err)
	}
	pool, err := LoadPool(cfg.ClientCA)
	if err != nil {
		return nil, err
	}
	issuer, err := nkeys.CreateAccount()
	if err != nil {
		return nil, fmt.Errorf("making the issuer of permissions: %w", err)
	}
	pub, err := issuer.PublicKey()
	if err != nil {
		return nil, fmt.Errorf("making the issuer of permissions: %w", err)
	}
	s := &Server{pool: pool, issuer: issuer, secret: rand.Text()}
	// Client certificates are asked for and judged in authorize: a box without one
	// may still enrol.
	tc := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert}
	opts := &server.Options{
		ServerName: "edgekeep", Host: cfg.Host, Port: cfg.ClientPort, NoSigs: true, NoLog: true,
		TLSConfig: tc, TLS: true, TLSTimeout: 10, AuthTimeout: 10,
		JetStream: true, StoreDir: cfg.Dir, SyncAlways: true, JetStreamMaxStore: cfg.StoreLimit,
		MaxPayload: 1 << 20, MaxControlLine: 4096,
		Users: []*server.User{{Username: serviceUser, Password: s.secret}, {Username: authUser, Password: s.secret}},
		AuthCallout: &server.AuthCallout{
			Issuer: pub, Account: server.DEFAULT_GLOBAL_ACCOUNT, AuthUsers: []string{serviceUser, authUser},
		},
	}
	if cfg.MQTTPort != 0 {
		opts.MQTT = server.MQTTOpts{Host: cfg.Host, Port: cfg.MQTTPort, TLSConfig: tc, TLSTimeout: 10, AuthTimeout: 10}
	}
	if s.srv, err = server.NewServer(opts); err != nil {
		return nil, fmt.Errorf("the embedded server: %w", err)
	}
	go s.srv.Start() // ends with Shutdown
	if !s.srv.ReadyForConnections(30 * time.Second) {
		s.srv.Shutdown()
		return nil, errors.New("the embedded server did not start in 30 s: is its port taken, or its directory not writable?")
	}
	if s.nc, err = s.connect(authUser); err != nil {
		s.Stop()
		return nil, err
	}
	if _, err := s.nc.Subscribe("$SYS.REQ.USER.AUTH", s.authorize); err != nil {
		s.Stop()
		return nil, fmt.Errorf("the embedded server: %w", err)
	}
	if cfg.MQTTPort != 0 {
		service, err := s.Connect()
		if err != nil {
			s.Stop()
			return nil, err
		}
		ctx, cancel := context.WithCancel(context.Background())
		s.stop = cancel
		go func() { // ends with Stop
			defer service.Close()
			s.boundMQTT(ctx, service)
		}()
	}
	return s, s.nc.Flush()
}

// LoadPool reads a PEM file of CA certificates.
func LoadPool(path string) (*x509.CertPool, error) {
	raw, err := readFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(raw) {
		return nil, fmt.Errorf("%s holds no PEM certificate", path)
	}
	return pool, nil
}

// Connect returns an in-process connection for the roles.
func (s *Server) Connect() (*nats.Conn, error) { return s.connect(serviceUser) }

func (s *Server) connect(user string) (*nats.Conn, error) {
	nc, err := nats.Connect("", nats.InProcessServer(s.srv), nats.UserInfo(user, s.secret), nats.MaxReconnects(-1))
	if err != nil {
		return nil, fmt.Errorf("connecting to the embedded server: %w", err)
	}
	return nc, nil
}

// ClientURL is where the CLI connects, MQTTURL where gateways do.
func (s *Server) ClientURL() string { return "tls://" + s.srv.Addr().String() }

// MQTTAddr is the address of the MQTT listener.
func (s *Server) MQTTAddr() string {
	v, err := s.srv.Varz(nil)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%s:%d", v.MQTT.Host, v.MQTT.Port)
}

// Stop ends the server in good order.
func (s *Server) Stop() {
	if s.stop != nil {
		s.stop()
	}
	if s.nc != nil {
		s.nc.Close()
	}
	s.srv.Shutdown()
	s.srv.WaitForShutdown()
}

// Disconnect ends the connections of a gateway.
func (s *Server) Disconnect(tenant, gateway string) {
	conns, err := s.srv.Connz(&server.ConnzOptions{MQTTClient: mqtt.ClientID(tenant, gateway), Limit: 16})
	if err != nil {
		return
	}
	for _, c := range conns.Conns {
		_ = s.srv.DisconnectClientByID(c.Cid) // gone already: fine
	}
}

// authorize answers the server's question who may do what.
func (s *Server) authorize(m *nats.Msg) {
	req, err := jwt.DecodeAuthorizationRequestClaims(string(m.Data))
	if err != nil {
		return
	}
	rsp := jwt.NewAuthorizationResponseClaims(req.UserNkey)
	rsp.Audience = req.Server.ID
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	user, err := s.permit(ctx, req)
	if err == nil {
		rsp.Jwt, err = user.Encode(s.issuer)
	}
	if err != nil {
		rsp.Error = err.Error()
	}
	token, err := rsp.Encode(s.issuer)
	if err != nil {
		return // the server refuses what gets no answer
	}
	_ = m.Respond([]byte(token))
}

// permit decides what a connection may do.
func (s *Server) permit(ctx context.Context, req *jwt.AuthorizationRequestClaims) (*jwt.UserClaims, error) {
	u := jwt.NewUserClaims(req.UserNkey)
	u.Audience = server.DEFAULT_GLOBAL_ACCOUNT
	u.Limits.Subs, u.Limits.Payload, u.Limits.Data = 64, 1<<20, -1
	if req.ClientInformation.Type == "mqtt" {
		u.Limits.Payload = mqtt.MaxPayload
	}
	overMQTT := req.ClientInformation.Type == "mqtt"
	leaf, err := s.verified(req.TLS)
	if err != nil {
		return nil, err
	}
	if leaf == nil {
		return permitBoot(u, req, overMQTT)
	}
	role, cn := "", leaf.Subject.CommonName
	if len(leaf.Subject.OrganizationalUnit) == 1 {
		role = leaf.Subject.OrganizationalUnit[0]
	}
	u.Name = role + " " + cn
	tenant, name, _ := strings.Cut(cn, "/")
	if role != RoleMonitor && (!attest.ValidName(tenant) || !attest.ValidName(name)) {
		return nil, fmt.Errorf("the certificate's common name %.64q is not tenant/name", cn) // it becomes part of a subject
	}
	switch {
	case role == RoleGateway && overMQTT:
		if req.ClientInformation.MQTT != mqtt.ClientID(tenant, name) {
			return nil, errors.New("the client id is not the certificate's")
		}
		if f := s.revoked.Load(); f == nil || (*f)(ctx, tenant, name, leaf.SerialNumber.Bytes()) {
			return nil, errors.New("the gateway's certificate is not valid any more")
		}
		u.Expires = leaf.NotAfter.Unix() // a connection does not outlive its certificate
		allow(u, topics(tenant, name, "evidence", "sealed", "result", "pull", "hello", "ask", "peer"), []string{"ek1." + tenant + "." + name + ".down.*"})
	case role == RoleMonitor && overMQTT:
		allow(u, []string{"ek1.monitor.>"}, []string{"ek1.>", "ek1"}) // "ek1/#" means both
	case role == RoleOperator && !overMQTT:
		allow(u, []string{"api." + tenant + ".>"}, []string{Inbox(leaf) + ".>"})
	case role == RoleConsumer && !overMQTT:
		allow(u, []string{"api." + tenant + ".data.>"}, []string{Inbox(leaf) + ".>"})
	default:
		return nil, fmt.Errorf("a certificate of role %q may not do this", role)
	}
	return u, nil
}

// permitBoot lets a box without a certificate reach its enrolment topics.
func permitBoot(u *jwt.UserClaims, req *jwt.AuthorizationRequestClaims, overMQTT bool) (*jwt.UserClaims, error) {
	hash := req.ConnectOptions.Username
	if raw, err := hex.DecodeString(hash); !overMQTT || err != nil || len(raw) != 32 || strings.ToLower(hash) != hash ||
		!strings.HasPrefix(req.ClientInformation.MQTT, "boot_") {
		return nil, errors.New("a client certificate is needed")
	}
	u.Name = "boot " + hash
	allow(u, topics(mqtt.Boot, hash, "enrol", "activate"), []string{"ek1.boot." + hash + ".down.*"})
	return u, nil
}

// topics are the subjects of a gateway's own messages of these kinds.
func topics(tenant, gateway string, kinds ...string) []string {
	out := make([]string, len(kinds))
	for i, k := range kinds {
		out[i] = mqtt.Topic{Tenant: tenant, Gateway: gateway, Up: true, Kind: k}.Subject()
	}
	return out
}

// boundMQTT bounds the streams in which the server keeps what MQTT clients may
// leave behind: retained messages, sessions, undelivered messages. We need none
// of it, and a box without certificate could fill the disk with it. The streams
// come with the first MQTT client, so it looks again until they are there.
func (s *Server) boundMQTT(ctx context.Context, nc *nats.Conn) {
	js, err := jetstream.New(nc)
	if err != nil {
		return
	}
	left := map[string]int64{"$MQTT_rmsgs": 1 << 20, "$MQTT_sess": 16 << 20, "$MQTT_msgs": 64 << 20}
	for len(left) > 0 {
		for name, limit := range left {
			stream, err := js.Stream(ctx, name)
			if err != nil {
				continue
			}
			cfg := stream.CachedInfo().Config
			cfg.MaxBytes, cfg.Discard = limit, jetstream.DiscardOld
			if name == "$MQTT_rmsgs" {
				cfg.Discard = jetstream.DiscardNew
			}
			if _, err := js.UpdateStream(ctx, cfg); err == nil {
				delete(left, name)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func allow(u *jwt.UserClaims, pub, sub []string) {
	u.Permissions.Pub.Allow = pub
	u.Permissions.Sub.Allow = sub
}

// inbox begins every subject that answers come on: NATS's own, which the roles
// use, and those of Inbox.
const inbox = "_INBOX"

// Inbox is the prefix under which a person's answers come, so that nobody else
// can listen to them.
func Inbox(leaf *x509.Certificate) string {
	return inbox + "_" + hex.EncodeToString(leaf.SerialNumber.Bytes())
}

// verified returns the client's certificate, nil if it showed none, and an error
// if it is not ours.
func (s *Server) verified(t *jwt.ClientTLS) (*x509.Certificate, error) {
	if t == nil {
		return nil, errors.New("TLS is needed")
	}
	certs := t.Certs
	if len(t.VerifiedChains) > 0 {
		certs = t.VerifiedChains[0]
	}
	if len(certs) == 0 {
		return nil, nil
	}
	block, _ := pem.Decode([]byte(certs[0]))
	if block == nil {
		return nil, errors.New("the client certificate cannot be read")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, errors.New("the client certificate cannot be read")
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: s.pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return nil, fmt.Errorf("the client certificate: %w", err)
	}
	return leaf, nil
}
