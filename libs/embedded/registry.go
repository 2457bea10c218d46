package embedded

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
)

const (
	// maxManifest bounds a manifest in bytes, as olareg does.
	maxManifest = 8 << 20
	// registryGrace is how long requests in hand may go on when the registry stops.
	registryGrace = 5 * time.Second
)

// registry is olareg behind authentication, with what it lacks: a lock per
// repository (its referrers are an unlocked read-modify-write, and it reads
// without a lock whether a repository exists), a list of its repositories and
// push notifications.
type registry struct {
	olareg        http.Handler
	password      [sha256.Size]byte
	anonymousPull bool // GET and HEAD need no password
	hook          *hook
	dir           string
	address       string
	instance      string // of this start, as Distribution's source.instanceID
	log           *slog.Logger
	locks         sync.Map // repository → *sync.Mutex
}

func startRegistry(listener net.Listener, dir, password string, anonymousPull bool, hook *hook, log *slog.Logger) (stop func() error) {
	yes := true
	store := olareg.New(config.Config{
		Storage: config.ConfigStorage{StoreType: config.StoreDir, RootDir: dir},
		API: config.ConfigAPI{
			DeleteEnabled: &yes,
			Blob:          config.ConfigAPIBlob{DeleteEnabled: &yes},
			Manifest:      config.ConfigAPIManifest{Limit: maxManifest},
		},
		Log: log,
	})
	r := &registry{
		olareg: store, password: sha256.Sum256([]byte(password)), anonymousPull: anonymousPull, hook: hook, dir: dir,
		address: listener.Addr().String(), instance: newID(), log: log,
	}
	server := &http.Server{
		Handler: r, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), registryGrace)
		defer cancel()
		err := server.Shutdown(ctx)
		if errors.Is(err, context.DeadlineExceeded) {
			err = server.Close() // a pull that takes longer is broken off; its client resumes
		}
		if serveErr := <-served; !errors.Is(serveErr, http.ErrServerClosed) {
			err = errors.Join(err, serveErr)
		}
		if err := errors.Join(err, store.Close()); err != nil {
			return fmt.Errorf("stop registry: %w", err)
		}
		return nil
	}
}

// ServeHTTP implements http.Handler.
func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if !r.authenticated(req) {
		w.Header().Set("WWW-Authenticate", `Basic realm="tidewaiter"`)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		// The client is gone if this fails.
		_, _ = io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`+"\n")
		return
	}
	target, ok := parseTarget(req.URL.Path)
	switch {
	case req.Method == http.MethodGet && path.Clean(req.URL.Path) == "/v2/_catalog":
		r.catalog(w, req)
	case !ok || target.kind == uploads: // nothing of a repository, or an upload that has begun
		r.olareg.ServeHTTP(w, req)
	case target.kind == manifests && (req.Method == http.MethodPut || req.Method == http.MethodDelete):
		r.changeManifest(w, req, target)
	case target.kind == blobs:
		r.blob(w, req, target)
	default:
		unlock := r.lock(target.repository)
		answer := &recorder{header: w.Header(), status: http.StatusOK}
		r.olareg.ServeHTTP(answer, req)
		unlock()
		answer.send(w)
	}
}

func (r *registry) authenticated(req *http.Request) bool {
	user, password, named := req.BasicAuth()
	if r.anonymousPull && !named && (req.Method == http.MethodGet || req.Method == http.MethodHead) {
		return true
	}
	given := sha256.Sum256([]byte(password))
	rightUser := subtle.ConstantTimeCompare([]byte(user), []byte(Username))
	return subtle.ConstantTimeCompare(given[:], r.password[:])&rightUser == 1
}

// Kinds of targets in a repository.
const (
	manifests = "manifests"
	blobs     = "blobs"
	uploads   = "uploads"
	index     = "index" // what is read from the repository's index
)

// target is what a request is about.
type target struct{ repository, kind, reference string }

// parseTarget takes a path apart (distribution-spec, "Endpoints"), cleaned as
// olareg cleans it.
func parseTarget(p string) (target, bool) {
	parts := strings.Split(strings.Trim(path.Clean("/"+p), "/"), "/")
	n := len(parts)
	if n < 4 || parts[0] != "v2" {
		return target{}, false
	}
	t := target{repository: strings.Join(parts[1:n-2], "/"), reference: parts[n-1]}
	switch {
	case parts[n-2] == manifests, parts[n-2] == blobs:
		t.kind = parts[n-2]
	case parts[n-2] == "referrers", parts[n-2] == "tags":
		t.kind = index
	case n > 4 && parts[n-3] == blobs && parts[n-2] == uploads:
		t.kind, t.repository = uploads, strings.Join(parts[1:n-3], "/")
	default:
		return target{}, false
	}
	return t, true
}

// lock waits for its turn in repositories, in the order of their names.
// unlock may be called twice.
func (r *registry) lock(repositories ...string) (unlock func()) {
	slices.Sort(repositories)
	var held []*sync.Mutex
	for _, repository := range slices.Compact(repositories) {
		value, _ := r.locks.LoadOrStore(repository, &sync.Mutex{})
		mu := value.(*sync.Mutex)
		mu.Lock()
		held = append(held, mu)
	}
	return sync.OnceFunc(func() {
		for _, mu := range held {
			mu.Unlock()
		}
	})
}

// blob serves or begins to take a blob. olareg looks at the repository before
// content flows: only that has to wait for others.
func (r *registry) blob(w http.ResponseWriter, req *http.Request, t target) {
	repositories := []string{t.repository}
	if from := req.URL.Query().Get("from"); from != "" { // a blob is mounted
		repositories = append(repositories, from)
	}
	unlock := r.lock(repositories...)
	defer unlock()
	req = req.Clone(req.Context())
	req.Body = &gatedBody{ReadCloser: req.Body, open: unlock}
	r.olareg.ServeHTTP(&gatedWriter{ResponseWriter: w, open: unlock}, req)
}

// gatedBody calls open before content flows in.
type gatedBody struct {
	io.ReadCloser
	open func()
}

func (g *gatedBody) Read(b []byte) (int, error) {
	g.open()
	return g.ReadCloser.Read(b)
}

// gatedWriter calls open before content flows out.
type gatedWriter struct {
	http.ResponseWriter
	open func()
}

func (g *gatedWriter) WriteHeader(status int) {
	g.open()
	g.ResponseWriter.WriteHeader(status)
}

func (g *gatedWriter) Write(b []byte) (int, error) {
	g.open()
	return g.ResponseWriter.Write(b)
}

// ReadFrom lets a file go to the network without passing through here.
func (g *gatedWriter) ReadFrom(src io.Reader) (int64, error) {
	g.open()
	return io.Copy(g.ResponseWriter, src)
}

// changeManifest lets olareg change a manifest and answers only when the
// notification of it is stored.
func (r *registry) changeManifest(w http.ResponseWriter, req *http.Request, t target) {
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxManifest))
	if err != nil {
		http.Error(w, "the manifest could not be read, or is over 8 MiB", http.StatusRequestEntityTooLarge)
		return
	}
	req = req.Clone(req.Context())
	req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))

	unlock := r.lock(t.repository) // until the notification is stored: they keep the order of the changes
	defer unlock()
	answer := &recorder{header: w.Header(), status: http.StatusOK}
	r.olareg.ServeHTTP(answer, req)
	if answer.status >= 200 && answer.status < 300 {
		if err := r.hook.add(r.events(req, t.repository, t.reference, body, answer.header)); err != nil {
			r.log.ErrorContext(req.Context(), "push notification could not be stored", slog.String("repository", t.repository), slog.Any("error", err))
			http.Error(w, "the push notification could not be stored", http.StatusInternalServerError)
			return
		}
	}
	unlock()
	answer.send(w)
}

// notification is the envelope that Distribution sends
// (distribution docs, "Work with notifications").
type notification struct {
	Events []notificationEvent `json:"events"`
}

type notificationEvent struct {
	ID        string              `json:"id"`
	Timestamp time.Time           `json:"timestamp"`
	Action    string              `json:"action"` // push or delete
	Target    notificationTarget  `json:"target"`
	Request   notificationRequest `json:"request"`
	Actor     notificationActor   `json:"actor"`
	Source    notificationSource  `json:"source"`
}

type notificationTarget struct {
	MediaType  string `json:"mediaType"`
	Digest     string `json:"digest"`
	Size       int    `json:"size"`
	Length     int    `json:"length,omitempty"`
	Repository string `json:"repository"`
	URL        string `json:"url,omitempty"`
	Tag        string `json:"tag,omitempty"`
}

type notificationRequest struct {
	ID        string `json:"id"`
	Addr      string `json:"addr"`
	Host      string `json:"host"`
	Method    string `json:"method"`
	UserAgent string `json:"useragent"`
}

type notificationActor struct {
	Name string `json:"name"`
}

type notificationSource struct {
	Addr       string `json:"addr"`
	InstanceID string `json:"instanceID"`
}

// events describes a change that was made: one event, or one a tag where
// several were pushed at once.
func (r *registry) events(req *http.Request, repository, reference string, body []byte, answer http.Header) []notificationEvent {
	user, _, _ := req.BasicAuth()
	common := notificationEvent{
		Timestamp: time.Now().UTC(),
		Target:    notificationTarget{Repository: repository},
		Request: notificationRequest{
			ID: newID(), Addr: req.RemoteAddr, Host: req.Host, Method: req.Method, UserAgent: req.UserAgent(),
		},
		Actor:  notificationActor{Name: user},
		Source: notificationSource{Addr: r.address, InstanceID: r.instance},
	}
	var tags []string
	if req.Method == http.MethodDelete {
		common.Action = "delete"
		if strings.Contains(reference, ":") {
			common.Target.Digest = reference
		} else {
			tags = []string{reference}
		}
	} else {
		digest := answer.Get("Docker-Content-Digest")
		common.Action = "push"
		common.Target.Digest = digest
		common.Target.MediaType = mediaType(req.Header.Get("Content-Type"), body)
		common.Target.Size, common.Target.Length = len(body), len(body)
		common.Target.URL = "http://" + req.Host + "/v2/" + repository + "/manifests/" + digest
		tags = answer.Values("OCI-Tag")
	}
	if len(tags) == 0 {
		common.ID = newID()
		return []notificationEvent{common}
	}
	events := make([]notificationEvent, 0, len(tags))
	for _, tag := range tags {
		e := common
		e.ID, e.Target.Tag = newID(), tag
		events = append(events, e)
	}
	return events
}

func mediaType(header string, body []byte) string {
	if header != "" {
		return header
	}
	var manifest struct {
		MediaType string `json:"mediaType"`
	}
	// olareg has accepted it; without the field the type stays unknown.
	_ = json.Unmarshal(body, &manifest)
	return manifest.MediaType
}

func newID() string { return strings.ToLower(rand.Text()) }

// recorder keeps a small answer until it may be sent.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) send(w http.ResponseWriter) {
	w.WriteHeader(r.status)
	// The client is gone if this fails; what it asked for is done.
	_, _ = w.Write(r.body.Bytes())
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }
