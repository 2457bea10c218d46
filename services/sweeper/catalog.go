package sweeper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/services/catalog"
)

// errCatalog is returned while catalog cannot be asked: the sweep goes on later.
var errCatalog = errors.New("catalog cannot be asked")

const (
	catalogTimeout = 45 * time.Second // more than catalog gives itself
	maxAnswer      = 8 << 20
)

// catalogAPI asks catalog what it knows.
type catalogAPI struct {
	url   string
	token func() (string, error)
	http  *http.Client
}

func newCatalogAPI(address string, token func() (string, error)) *catalogAPI {
	return &catalogAPI{url: strings.TrimSuffix(address, "/"), token: token, http: &http.Client{Timeout: catalogTimeout}}
}

// Known says what is known of tags of one repository, in their order.
func (c *catalogAPI) Known(ctx context.Context, q catalog.KnownQuery) ([]catalog.KnownTag, error) {
	body, err := json.Marshal(q)
	if err != nil {
		return nil, fmt.Errorf("encode question: %w", err)
	}
	var answer struct {
		Tags []catalog.KnownTag `json:"tags"`
	}
	if err := c.do(ctx, http.MethodPost, "/v1/known", body, &answer); err != nil {
		return nil, err
	}
	if len(answer.Tags) != len(q.Tags) {
		return nil, fmt.Errorf("it answers %d tags of %d: %w", len(answer.Tags), len(q.Tags), errCatalog)
	}
	return answer.Tags, nil
}

// ReadUpTo says whether catalog knows all pushes that were sent before a moment.
func (c *catalogAPI) ReadUpTo(ctx context.Context, until time.Time) (bool, error) {
	var answer struct {
		Read bool `json:"read"`
	}
	err := c.do(ctx, http.MethodGet, "/v1/read?"+url.Values{"until": {until.UTC().Format(time.RFC3339Nano)}}.Encode(), nil, &answer)
	return answer.Read, err
}

// Standings returns a page of the images that should carry statements, and how
// many there are in all.
func (c *catalogAPI) Standings(ctx context.Context, registry, after string, limit int) (page []catalog.Standing, next string, total int, err error) {
	var answer struct {
		Images []catalog.Standing `json:"images"`
		Total  int                `json:"total"`
		Next   string             `json:"next"`
	}
	err = c.do(ctx, http.MethodGet, "/v1/standings?"+listing(registry, after, limit), nil, &answer)
	return answer.Images, answer.Next, answer.Total, err
}

// Tags returns a page of the tags that are known to point somewhere.
func (c *catalogAPI) Tags(ctx context.Context, registry, after string, limit int) (page []catalog.RepositoryTag, next string, err error) {
	var answer struct {
		Tags []catalog.RepositoryTag `json:"tags"`
		Next string                  `json:"next"`
	}
	err = c.do(ctx, http.MethodGet, "/v1/tags?"+listing(registry, after, limit), nil, &answer)
	return answer.Tags, answer.Next, err
}

func listing(registry, after string, limit int) string {
	return url.Values{"registry": {registry}, "after": {after}, "limit": {strconv.Itoa(limit)}}.Encode()
}

func (c *catalogAPI) do(ctx context.Context, method, path string, body []byte, into any) error {
	token, err := c.token()
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("ask catalog: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w: %w", errCatalog, err)
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%w: read its answer: %w", errCatalog, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%w: it answers %s", errCatalog, resp.Status)
	}
	if err := json.Unmarshal(content, into); err != nil {
		return fmt.Errorf("%w: its answer is not understood", errCatalog)
	}
	return nil
}
