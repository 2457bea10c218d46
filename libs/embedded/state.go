package embedded

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// state is what has to be the same after a restart: clients keep addresses,
// and an image's identity holds its registry's.
type state struct {
	KafkaPort        int    `json:"kafkaPort"`
	RedisPort        int    `json:"redisPort"`
	RegistryPort     int    `json:"registryPort"`
	KafkaPassword    string `json:"kafkaPassword"`
	RedisPassword    string `json:"redisPassword"`
	RegistryPassword string `json:"registryPassword"`
}

const stateFile = "servers.json"

// loadState reads the state of the last start, or makes new passwords.
func loadState(dir string) (*state, error) {
	st := &state{}
	b, err := os.ReadFile(filepath.Join(dir, stateFile)) // #nosec G304 -- the operator names the directory
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	default:
		if err := json.Unmarshal(b, st); err != nil {
			return nil, fmt.Errorf("%s: %w", stateFile, err)
		}
	}
	for _, password := range []*string{&st.KafkaPassword, &st.RedisPassword, &st.RegistryPassword} {
		if *password == "" {
			*password = rand.Text()
		}
	}
	return st, nil
}

func (st *state) save(dir string) error {
	b, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, stateFile), append(b, '\n'))
}

// tryPorts calls listen with the remembered port, or where that is taken with
// others, and remembers the one that worked.
func (st *state) tryPorts(port *int, listen func(address string) error) (address string, err error) {
	for range 100 {
		if *port == 0 {
			*port = randomPort()
		}
		address = "127.0.0.1:" + strconv.Itoa(*port)
		err = listen(address)
		if err == nil || !errors.Is(err, syscall.EADDRINUSE) {
			return address, err
		}
		*port = 0
	}
	return address, err
}

// randomPort returns a port below those that systems hand out for outgoing
// connections, so that it is likely to be free again after a restart.
func randomPort() int {
	const low, high = 20000, 32000
	n, err := rand.Int(rand.Reader, big.NewInt(high-low))
	if err != nil {
		return low // never: crypto/rand does not fail
	}
	return low + int(n.Int64())
}

// listenRegistry listens where the registry was at the last start: unlike the
// other servers it cannot move, its address is in every image's identity.
func listenRegistry(address string, st *state) (net.Listener, error) {
	if address != "" {
		if err := checkLoopback(address); err != nil {
			return nil, fmt.Errorf("start registry: %w", err)
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("start registry: %w", err)
		}
		return l, nil
	}
	if st.RegistryPort != 0 {
		l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(st.RegistryPort))
		if err != nil {
			return nil, fmt.Errorf("start registry where it was before: %w", err)
		}
		return l, nil
	}
	var l net.Listener
	address, err := st.tryPorts(&st.RegistryPort, func(address string) (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("start registry on %s: %w", address, err)
	}
	return l, nil
}

func checkLoopback(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("%s is not a loopback address", address)
	}
	return nil
}

// writeFile replaces a file so that after a crash either the old or the new
// content is there, readable by its owner alone.
func writeFile(path string, content []byte) error {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600) // #nosec G304 -- below the operator's directory
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir) // #nosec G304 -- below the operator's directory
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
