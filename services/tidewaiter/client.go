package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/intake"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// cliName is what the command line is called where services have names: in
// credentials of their own ({service}) and in Kafka.
const cliName = "cli"

// serverFlags say which Tidewaiter a command talks to: the one whose services
// are named, the one that --config describes if that names Kafka's brokers, or
// one that runs on a data directory.
type serverFlags struct {
	Data     string `help:"Data directory of a running 'tidewaiter up'." type:"path" default:"./tidewaiter-data" env:"TIDEWAITER_DATA" placeholder:"DIR"`
	Server   string `help:"URL of catalog's API, instead of --config or --data." env:"TIDEWAITER_SERVER" placeholder:"URL"`
	Intake   string `help:"URL of intake, instead of --config or --data." env:"TIDEWAITER_INTAKE" placeholder:"URL"`
	Sweeper  string `help:"URL of sweeper, instead of --config or --data." env:"TIDEWAITER_SWEEPER" placeholder:"URL"`
	TokenEnv string `help:"Environment variable that holds the API's bearer token; not set: the one of --config or --data." default:"TIDEWAITER_TOKEN" placeholder:"NAME"`
}

// endpoint is where a service answers.
type endpoint struct {
	flag, service string
	url           string
	token         func() (string, error) // that it asks for; "": none
}

// api is a client of the services' HTTP APIs.
type api struct {
	catalog, intake, sweeper endpoint
	http                     *http.Client
}

func (f serverFlags) api(s *streams) (*api, error) {
	a := &api{
		catalog: endpoint{flag: "--server", service: "catalog", url: strings.TrimSuffix(f.Server, "/"), token: f.token("", "")},
		intake:  endpoint{flag: "--intake", service: "intake", url: strings.TrimSuffix(f.Intake, "/"), token: f.token("", "")},
		sweeper: endpoint{flag: "--sweeper", service: "sweeper", url: strings.TrimSuffix(f.Sweeper, "/"), token: f.token("", "")},
		http:    httpClient(),
	}
	if a.catalog.url != "" || a.intake.url != "" || a.sweeper.url != "" {
		return a, nil
	}
	cfg, err := run.Load(s.config, os.LookupEnv)
	if err != nil {
		return nil, err
	}
	if len(cfg.Kafka.Brokers) > 0 {
		return a, f.configured(cfg, a)
	}
	at, err := f.addresses()
	if err != nil {
		return nil, err
	}
	own := func() (string, error) { return at.Token, nil }
	a.catalog.url, a.intake.url, a.sweeper.url = at.Catalog, at.Intake, at.Sweeper
	a.catalog.token, a.intake.token, a.sweeper.token = own, own, own
	return a, nil
}

// configured takes the addresses and tokens that services have in their
// configuration; without its section a service is not known to run.
func (f serverFlags) configured(cfg *run.Config, a *api) error {
	c, i, w := catalog.DefaultConfig(), intake.DefaultConfig(), sweeper.DefaultConfig()
	for name, into := range map[string]any{"catalog": &c, "intake": &i, "sweeper": &w} {
		if !cfg.Has(name) {
			continue
		}
		if err := cfg.CheckSection(name, into); err != nil {
			return err
		}
	}
	a.catalog.url, a.catalog.token = allinone.Reachable(c.Listen), f.token(c.TokenFile, c.TokenEnv)
	if c.Listen == "" && w.Catalog != "" { // catalog runs elsewhere, where sweeper asks it
		a.catalog.url, a.catalog.token = strings.TrimSuffix(w.Catalog, "/"), f.token(w.CatalogTokenFile, w.CatalogTokenEnv)
	}
	a.sweeper.url, a.sweeper.token = allinone.Reachable(w.Listen), f.token(w.TokenFile, w.TokenEnv)
	if i.Admin != nil { // else it has no API
		a.intake.url, a.intake.token = allinone.Reachable(i.Listen), f.token(i.Admin.TokenFile, i.Admin.TokenEnv)
	}
	return nil
}

// token returns a function that reads the token that --token-env names, else
// that of a service.
func (f serverFlags) token(file, env string) func() (string, error) {
	return func() (string, error) {
		if token := os.Getenv(f.TokenEnv); token != "" {
			return token, nil
		}
		token, err := credential.Secret{File: file, Env: env}.First(os.LookupEnv) // two are valid at once while one is replaced
		if err != nil {
			return "", fmt.Errorf("the service's token: %w: %w", err, run.ErrConfig)
		}
		return token, nil
	}
}

func (f serverFlags) addresses() (allinone.Addresses, error) {
	a, err := allinone.ReadAddresses(f.Data)
	if err != nil {
		return a, unavailable(fmt.Errorf("%w; to ask services of 'tidewaiter run': --config FILE with kafka.brokers, or --server, --intake or --sweeper with --token-env", err))
	}
	return a, nil
}

// get fetches a path of a service's API; the caller closes the body.
func (a *api) get(ctx context.Context, of endpoint, path string) (io.ReadCloser, error) {
	return a.do(ctx, of, http.MethodGet, path, nil)
}

// ask is get for one JSON document.
func (a *api) ask(ctx context.Context, of endpoint, path string, into any) error {
	body, err := a.get(ctx, of, path)
	if err != nil {
		return err
	}
	return decode(body, into)
}

// post sends a document to a service's API and returns the answer's body.
func (a *api) post(ctx context.Context, to endpoint, path string, document any) (io.ReadCloser, error) {
	body, err := json.Marshal(document)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	return a.do(ctx, to, http.MethodPost, path, body)
}

func (a *api) do(ctx context.Context, e endpoint, method, path string, body []byte) (io.ReadCloser, error) {
	if e.url == "" {
		return nil, usage(fmt.Errorf("this command asks %s, and where that answers is not known: give %s URL, --config FILE (its %s.listen), or --data DIR",
			e.service, e.flag, e.service))
	}
	url := e.url + path
	shown := run.RedactURL(url)
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, usage(fmt.Errorf("make request: %w", err))
	}
	req.Header.Set("Content-Type", "application/json")
	token, err := e.token()
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return nil, unavailable(fmt.Errorf("ask %s: %w", shown, err))
	}
	if resp.StatusCode/100 == 2 {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	err = fmt.Errorf("ask %s: %s: %s", shown, resp.Status, strings.TrimSpace(string(text)))
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		return nil, &exitError{run.ExitUsage, fmt.Errorf("%w (set the token's environment variable, see --token-env)", err)}
	case http.StatusBadRequest, http.StatusNotFound:
		return nil, usage(err)
	}
	return nil, unavailable(err)
}

// decode reads one JSON document and closes the body.
func decode(body io.ReadCloser, into any) error {
	defer body.Close()
	if err := json.NewDecoder(body).Decode(into); err != nil {
		return unavailable(fmt.Errorf("read answer: %w", err))
	}
	return nil
}

// printJSON writes a document for machines.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// printLine writes a document as one JSON line.
func printLine(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

func httpClient() *http.Client { return &http.Client{Timeout: 30 * time.Second} }
