package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// cliName is what the command line is called where services have names: in
// credentials of their own ({service}) and in Kafka.
const cliName = "cli"

// serverFlags say which Tidewaiter a command talks to: one that runs on a data
// directory, or one by URL.
type serverFlags struct {
	Data     string `help:"Data directory of a running 'tidewaiter up'." type:"path" default:"./tidewaiter-data" env:"TIDEWAITER_DATA" placeholder:"DIR"`
	Server   string `help:"URL of catalog's API, instead of --data." env:"TIDEWAITER_SERVER" placeholder:"URL"`
	Intake   string `help:"URL of intake, instead of --data." env:"TIDEWAITER_INTAKE" placeholder:"URL"`
	Sweeper  string `help:"URL of sweeper, instead of --data." env:"TIDEWAITER_SWEEPER" placeholder:"URL"`
	TokenEnv string `help:"Environment variable that holds the API's bearer token." default:"TIDEWAITER_TOKEN" placeholder:"NAME"`
}

// api is a client of catalog's and intake's HTTP API.
type api struct {
	catalog, intake, sweeper, token string
	http                            *http.Client
}

func (f serverFlags) api() (*api, error) {
	client := httpClient()
	if f.Server != "" || f.Intake != "" || f.Sweeper != "" {
		return &api{
			catalog: strings.TrimSuffix(f.Server, "/"), intake: strings.TrimSuffix(f.Intake, "/"),
			sweeper: strings.TrimSuffix(f.Sweeper, "/"),
			token:   os.Getenv(f.TokenEnv), http: client,
		}, nil
	}
	a, err := f.addresses()
	if err != nil {
		return nil, err
	}
	return &api{catalog: a.Catalog, intake: a.Intake, sweeper: a.Sweeper, token: a.Token, http: client}, nil
}

func (f serverFlags) addresses() (allinone.Addresses, error) {
	a, err := allinone.ReadAddresses(f.Data)
	if err != nil {
		return a, unavailable(err)
	}
	return a, nil
}

// get fetches a path of catalog's API; the caller closes the body.
func (a *api) get(ctx context.Context, path string) (io.ReadCloser, error) {
	if a.catalog == "" {
		return nil, usage(errors.New("this command asks catalog: give --server URL or --data DIR"))
	}
	return a.do(ctx, http.MethodGet, a.catalog+path, nil)
}

// postCatalog sends a document to catalog's API and returns the answer's body.
func (a *api) postCatalog(ctx context.Context, path string, document any) (io.ReadCloser, error) {
	if a.catalog == "" {
		return nil, usage(errors.New("this command tells catalog: give --server URL or --data DIR"))
	}
	return a.send(ctx, a.catalog+path, document)
}

// post sends a document to intake's API and returns the answer's body.
func (a *api) post(ctx context.Context, path string, document any) (io.ReadCloser, error) {
	if a.intake == "" {
		return nil, usage(errors.New("this command talks to intake: give --intake URL or --data DIR"))
	}
	return a.send(ctx, a.intake+path, document)
}

func (a *api) send(ctx context.Context, url string, document any) (io.ReadCloser, error) {
	body, err := json.Marshal(document)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	return a.do(ctx, http.MethodPost, url, body)
}

func (a *api) do(ctx context.Context, method, url string, body []byte) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, usage(fmt.Errorf("make request: %w", err))
	}
	req.Header.Set("Content-Type", "application/json")
	if a.token != "" {
		req.Header.Set("Authorization", "Bearer "+a.token)
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return nil, unavailable(fmt.Errorf("ask %s: %w", url, err))
	}
	if resp.StatusCode/100 == 2 {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	err = fmt.Errorf("ask %s: %s: %s", url, resp.Status, strings.TrimSpace(string(text)))
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
