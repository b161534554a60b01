package tpm
import ("testing";"crypto")
func TestDbg(t *testing.T) {
	d := open(t)
	ak := newAK(t, d)
	key, _ := newKey(t, d, Signing)
	_, err := key.Sign(nil, qualifying, crypto.SHA256)
	t.Log(err)
	extend(t, d, measured[0], "something else boots")
	_, err = key.Sign(nil, qualifying, crypto.SHA256)
	t.Log(err)
	_, err = ak.Certify(key, qualifying)
	t.Log(err)
	key.auth = auth(9)
	_, err = ak.Certify(key, qualifying)
	t.Log(err)
	key.auth = auth(2)
	key.pcrs = []int{5}
	_, err = ak.Certify(key, qualifying)
	t.Log(err)
}
