package fleet

import (
	"context"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"edgekeep/cloud"
	"edgekeep/cloud/verifier"
	"edgekeep/internal/cose"
	"edgekeep/mqtt"
	"edgekeep/tee/attest"
	"edgekeep/tee/message"
	"edgekeep/tee/tpm"
)

// maxPending bounds the list of TPMs that wait for approval: anyone with a
// genuine TPM can get on it.
const maxPending = 10_000

// enrol answers a box that wants to enrol, or that has an identity here and no
// certificate that works: with a credential that only its TPM can open, and a
// challenge.
func (f *Fleet) enrol(ctx context.Context, t mqtt.Topic, data []byte) error {
	m, err := message.Decode[message.Enrol](data)
	if err != nil {
		return err
	}
	hash, cert, err := f.checkEK(t, m.EK, m.EKCert)
	if err != nil {
		return err
	}
	if len(m.Nonce) != message.NonceSize {
		return errors.New("a nonce has 32 bytes")
	}
	name, err := tpm.Name(m.AK)
	if err == nil {
		err = tpm.CheckAK(m.AK)
	}
	if err != nil {
		return err
	}
	tenant, gateway, err := f.admitted(ctx, hash, name, cert)
	if err != nil {
		return f.sendPending(t, m.Nonce, err.Error())
	}
	root, err := f.Tenants.Tenant(tenant)
	if err != nil {
		return err
	}
	item := message.Item{Nonce: m.Nonce, Time: f.Now().Unix(), Subject: tenant + "/" + gateway, Roots: root.Bundle}
	blob, secret, err := tpm.MakeCredential(m.EK, name, f.secret(hash, name, m.Nonce))
	if err != nil {
		return err
	}
	item.Credential = &message.Credential{Blob: blob, Secret: secret}
	if item.Challenge, err = f.challenge(ctx, tenant, gateway); err != nil {
		item.Credential, item.Reason = nil, err.Error()
	}
	return f.send(t.Tenant, t.Gateway, item)
}

// sendPending tells a box why it has to wait. It does not say under which
// tenant's roots, because it belongs to none: the box sees that it is not
// admitted, and believes nobody about anything.
func (f *Fleet) sendPending(t mqtt.Topic, nonce []byte, reason string) error {
	return f.send(t.Tenant, t.Gateway, message.Item{Nonce: nonce, Time: f.Now().Unix(), Reason: reason})
}

// secret is what a credential holds. Any replica can compute it again.
func (f *Fleet) secret(ekHash, akName, nonce []byte) []byte {
	mac := hmac.New(sha256.New, f.EnrolKey)
	mac.Write(cose.MustMarshal([]any{"edgekeep credential", ekHash, akName, nonce}))
	return mac.Sum(nil)
}

// subjectAltName is critical in EK certificates: it holds the TPM's model, which
// Go's parser does not know (TCG EK Credential Profile §3.2.9). It is parsed here
// and then off the list.
var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidEKCertificate  = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
)

// checkEK checks that the topic's EK is that of a genuine TPM: its certificate
// chains to a configured manufacturer. That admits nothing.
func (f *Fleet) checkEK(t mqtt.Topic, ek, der []byte) ([]byte, *x509.Certificate, error) {
	hash, err := tpm.EKHash(ek)
	if err != nil {
		return nil, nil, err
	}
	if hex.EncodeToString(hash) != t.Gateway {
		return nil, nil, errors.New("the EK is not the one that the topic names")
	}
	pub, err := tpm.EKPublicKey(ek)
	if err != nil {
		return nil, nil, err
	}
	cert, err := VerifyEK(der, f.EKRoots, f.Now())
	if err != nil {
		return nil, nil, err
	}
	same := false
	switch k := pub.(type) {
	case *rsa.PublicKey:
		same = k.Equal(cert.PublicKey)
	case *ecdsa.PublicKey:
		same = k.Equal(cert.PublicKey)
	}
	if !same {
		return nil, nil, errors.New("the EK certificate is for another key")
	}
	return hash, cert, nil
}

// VerifyEK verifies an EK certificate to the configured CA certificates. Each of
// them is trusted, roots and intermediates alike: makers do not always publish
// the root above their own, and whoever configures one means it.
func VerifyEK(der []byte, cas []*x509.Certificate, now time.Time) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("the EK certificate: %w", err)
	}
	rest := cert.UnhandledCriticalExtensions[:0:0]
	for _, oid := range cert.UnhandledCriticalExtensions {
		if !oid.Equal(oidSubjectAltName) {
			rest = append(rest, oid)
		}
	}
	if err := parseTPMName(cert); err != nil {
		return nil, err
	}
	cert.UnhandledCriticalExtensions = rest
	roots := x509.NewCertPool()
	for _, ca := range cas {
		roots.AddCert(ca)
	}
	if _, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return nil, fmt.Errorf("the EK certificate does not chain to a configured TPM manufacturer (issuer %.200q): %w; "+
			"if you trust its maker, add the maker's CA certificates to the directory ek_ca", cert.Issuer.String(), err)
	}
	if len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) > 0 {
		for _, oid := range cert.UnknownExtKeyUsage {
			if oid.Equal(oidEKCertificate) {
				return cert, nil
			}
		}
		return nil, errors.New("the certificate is not for an EK (extended key usage 2.23.133.8.1)")
	}
	return cert, nil
}

// parseTPMName checks that a subjectAltName, if there is one, is a well-formed
// GeneralNames.
func parseTPMName(cert *x509.Certificate) error {
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names asn1.RawValue
		rest, err := asn1.Unmarshal(ext.Value, &names)
		if err != nil || len(rest) > 0 || names.Tag != asn1.TagSequence || !names.IsCompound {
			return errors.New("the EK certificate's subjectAltName is malformed")
		}
		for b := names.Bytes; len(b) > 0; {
			var name asn1.RawValue
			if b, err = asn1.Unmarshal(b, &name); err != nil {
				return errors.New("the EK certificate's subjectAltName is malformed")
			}
		}
	}
	return nil
}

// admitted returns the gateway that this EK may be, or the reason why it may not
// (and lists it as pending).
func (f *Fleet) admitted(ctx context.Context, hash, akName []byte, cert *x509.Certificate) (tenant, gateway string, err error) {
	key := hex.EncodeToString(hash)
	e, _, ok, err := cloud.Get[cloud.EK](ctx, f.Bus.EKs, key)
	if err != nil {
		return "", "", err
	}
	if ok && len(e.Admission) > 0 {
		a, err := f.admission(e.Admission)
		if err != nil {
			return "", "", err
		}
		switch e.State {
		case cloud.Approved:
			return a.Tenant, a.Gateway, nil
		case cloud.Enrolled:
			g, _, found, err := cloud.Get[cloud.Gateway](ctx, f.Bus.Gateways, cloud.Key(a.Tenant, a.Gateway))
			if err != nil {
				return "", "", err
			}
			if found && !g.Revoked && string(g.AKName) == string(akName) && string(g.EKHash) == string(hash) {
				return a.Tenant, a.Gateway, nil
			}
		}
	}
	reason := "this TPM is not admitted: an operator has to approve it: edgekeep gateway approve " + key
	switch {
	case ok && e.State == cloud.Enrolled:
		reason = "this TPM enrolled before with another attestation key: enrolling again needs approval again: edgekeep gateway approve " + key
	case ok && e.State == cloud.Revoked:
		reason = "this gateway was revoked: an operator has to approve it again: edgekeep gateway approve " + key
	}
	return "", "", errors.Join(errors.New(reason), f.listPending(ctx, key, hash, cloud.Cut(cert.Issuer.String(), 200), reason))
}

func (f *Fleet) listPending(ctx context.Context, key string, hash []byte, maker, reason string) error {
	if st, err := f.Bus.EKs.Status(ctx); err == nil && st.Values() > maxPending {
		return errors.New("the list of TPMs that wait is full")
	}
	_, err := cloud.Change(ctx, f.Bus.EKs, key, func(e *cloud.EK, found bool) error {
		if !found {
			*e = cloud.EK{Hash: hash, State: cloud.Pending, Maker: maker, Seen: f.Now().Unix()}
		}
		e.Reason = reason
		return nil
	})
	return err
}

// admission verifies the operator's word.
func (f *Fleet) admission(msg []byte) (message.Admission, error) {
	_, payload, err := cose.Peek1(msg)
	if err != nil {
		return message.Admission{}, err
	}
	a, err := message.Decode[message.Admission](payload)
	if err != nil {
		return a, err
	}
	t, err := f.Tenants.Tenant(a.Tenant)
	if err != nil {
		return a, err
	}
	if a, err = message.VerifyAdmission(t.Operator, msg); err != nil {
		return a, err
	}
	if !attest.ValidName(a.Gateway) || a.Tenant == mqtt.Boot || a.Tenant == "monitor" {
		return a, fmt.Errorf("not a gateway's name: %.64q", a.Tenant+"/"+a.Gateway)
	}
	return a, nil
}

// activate takes a box's proof and evidence. With an affirming verdict the box
// is enrolled, or recognised, and gets its certificate.
func (f *Fleet) activate(ctx context.Context, t mqtt.Topic, data []byte) error {
	m, err := message.Decode[message.Activate](data)
	if err != nil {
		return err
	}
	hash, cert, err := f.checkEK(t, m.EK, m.EKCert)
	if err != nil {
		return err
	}
	name, err := tpm.Name(m.AK)
	if err != nil {
		return err
	}
	if len(m.Nonce) != message.NonceSize || len(m.Enrol) != message.NonceSize {
		return errors.New("a nonce has 32 bytes")
	}
	tenant, gateway, err := f.admitted(ctx, hash, name, cert)
	if err != nil {
		return f.sendPending(t, m.Nonce, err.Error())
	}
	if !hmac.Equal(m.Proof, message.Proof(f.secret(hash, name, m.Enrol), m.Evidence)) {
		err := errors.New("the credential was not opened: attestation key and EK are not in the same TPM")
		f.Count(tenant, "refused", err.Error()) // somebody poses as a TPM of this tenant's
		return err
	}
	root, err := f.Tenants.Tenant(tenant)
	if err != nil {
		return err
	}
	item := message.Item{Nonce: m.Nonce, Time: f.Now().Unix(), Subject: tenant + "/" + gateway, Roots: root.Bundle}
	ask := verifier.AppraiseRequest{Tenant: tenant, Gateway: gateway, EKHash: hash, AKName: name, Evidence: m.Evidence}
	g, _, found, err := cloud.Get[cloud.Gateway](ctx, f.Bus.Gateways, cloud.Key(tenant, gateway))
	if err != nil {
		return err
	}
	ask.Hold = !found || g.Revoked || string(g.AKName) != string(name)
	b, err := cloud.Ask[verifier.Bytes](ctx, f.Bus.NC, "svc.appraise", ask)
	if err != nil {
		item.Reason = cloud.Cut(err.Error(), 512)
		return f.send(t.Tenant, t.Gateway, item)
	}
	v, err := attest.VerifyVerdict(root.Verifier, b.Data)
	if err != nil {
		return err
	}
	item.Verdict = b.Data
	if v.Usable(item.Subject, tenant, f.Now()) == nil {
		if item.Certificate, err = f.register(ctx, hash, name, v); err != nil {
			item.Verdict, item.Reason = nil, err.Error()
		} else if ask.Hold { // it is this TPM's name now: the verdict may stand as the gateway's newest
			ask.Hold = false
			if _, err := cloud.Ask[verifier.Bytes](ctx, f.Bus.NC, "svc.appraise", ask); err != nil {
				return err
			}
		}
	}
	return f.send(t.Tenant, t.Gateway, item)
}

// register makes an enrolment final, once for each admission, and issues the
// certificate. It may be repeated by the same attestation key.
func (f *Fleet) register(ctx context.Context, hash, akName []byte, v attest.Verdict) ([][]byte, error) {
	key := hex.EncodeToString(hash)
	e, rev, ok, err := cloud.Get[cloud.EK](ctx, f.Bus.EKs, key)
	if err != nil {
		return nil, err
	}
	if !ok || e.State != cloud.Approved && e.State != cloud.Enrolled {
		return nil, errors.New("the approval was withdrawn")
	}
	a, err := f.admission(e.Admission)
	if err != nil {
		return nil, err
	}
	chain, serial, expires, err := f.certify(a.Tenant, a.Gateway, v)
	if err != nil {
		return nil, err
	}
	_, err = cloud.Change(ctx, f.Bus.Gateways, cloud.Key(a.Tenant, a.Gateway), func(g *cloud.Gateway, found bool) error {
		if found && string(g.EKHash) != string(hash) {
			return errOtherTPM
		}
		same := found && string(g.AKName) == string(akName) && string(g.EKHash) == string(hash)
		current := found && string(g.AdmissionID) == string(a.ID)
		if found && g.Used(a.ID) && (!current || !same || g.Revoked) {
			return errors.New("this approval was used: enrolling again needs approval again")
		}
		if !current {
			former := g.Former
			if found {
				former = append(former, g.AdmissionID)
			}
			*g = cloud.Gateway{
				Tenant: a.Tenant, Name: a.Gateway, EKHash: hash, AKName: akName, AdmissionID: a.ID, Enrolled: cloud.SerialTime(serial),
				Former: former,
			}
		}
		g.CertSerial, g.CertExpires = serial, expires
		return nil
	})
	if err != nil {
		return nil, err
	}
	if e.State == cloud.Approved {
		e.State, e.Reason = cloud.Enrolled, ""
		if err := cloud.Put(ctx, f.Bus.EKs, key, e, rev); err != nil {
			return nil, err
		}
		f.Log.Info("enrolled", "gateway", a.Tenant+"/"+a.Gateway, "ek-hash", key)
	}
	return chain, nil
}

// certificateLife is how long a gateway's TLS certificate is good for. It is
// renewed after two thirds of that, on an affirming verdict.
const certificateLife = 30 * 24 * time.Hour

func (f *Fleet) certify(tenant, gateway string, v attest.Verdict) (chain [][]byte, serial []byte, expires int64, err error) {
	pub, err := cose.UnmarshalKey(v.Keys[attest.PurposeTLS])
	if err != nil {
		return nil, nil, 0, fmt.Errorf("the verdict names no TLS key: %w", err)
	}
	cert, err := f.CA.Issue(cloud.RoleGateway, mqtt.CommonName(tenant, gateway), pub, f.Now(), certificateLife)
	if err != nil {
		return nil, nil, 0, err
	}
	return [][]byte{cert.Raw, f.CA.Certificate().Raw}, cert.SerialNumber.Bytes(), cert.NotAfter.Unix(), nil
}

// renew issues a new certificate when the old one has lived two thirds of its
// life.
func (f *Fleet) renew(ctx context.Context, g cloud.Gateway, v attest.Verdict) ([][]byte, error) {
	if f.Now().Unix() < g.CertExpires-int64(certificateLife/3/time.Second) {
		return nil, nil
	}
	chain, serial, expires, err := f.certify(g.Tenant, g.Name, v)
	if err != nil {
		return nil, err
	}
	_, err = cloud.Change(ctx, f.Bus.Gateways, cloud.Key(g.Tenant, g.Name), func(now *cloud.Gateway, found bool) error {
		if !found || now.Revoked || string(now.AdmissionID) != string(g.AdmissionID) {
			return errors.New("no such gateway is enrolled")
		}
		now.CertSerial, now.CertExpires = serial, expires
		return nil
	})
	return chain, err
}

// Revoked reports whether a gateway's certificate may not be used any more: the
// gateway is revoked, or gone, or enrolled anew with another certificate.
func (f *Fleet) Revoked(ctx context.Context, tenant, gateway string, serial []byte) bool {
	g, err := f.gateway(ctx, tenant, gateway)
	if err != nil {
		return true
	}
	// The certificate before a renewal stays good until it expires; one from before
	// the enrolment does not.
	return cloud.SerialTime(serial) < g.Enrolled
}
