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
// repository around changes (its referrers are an unlocked read-modify-write)
// and push notifications.
type registry struct {
	olareg        http.Handler
	password      [sha256.Size]byte
	anonymousPull bool // GET and HEAD need no password
	hook          *hook
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
		olareg: store, password: sha256.Sum256([]byte(password)), anonymousPull: anonymousPull, hook: hook,
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
	repository, reference, ok := manifestPath(req.URL.Path)
	if !ok || (req.Method != http.MethodPut && req.Method != http.MethodDelete) {
		r.olareg.ServeHTTP(w, req)
		return
	}
	r.changeManifest(w, req, repository, reference)
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

// manifestPath takes /v2/<repository>/manifests/<reference> apart, cleaning
// the path as olareg does.
func manifestPath(p string) (repository, reference string, ok bool) {
	parts := strings.Split(strings.Trim(path.Clean("/"+p), "/"), "/")
	n := len(parts)
	if n < 4 || parts[0] != "v2" || parts[n-2] != "manifests" {
		return "", "", false
	}
	return strings.Join(parts[1:n-2], "/"), parts[n-1], true
}

// changeManifest lets olareg change a manifest and answers only when the
// notification of it is stored.
func (r *registry) changeManifest(w http.ResponseWriter, req *http.Request, repository, reference string) {
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxManifest))
	if err != nil {
		http.Error(w, "the manifest could not be read, or is over 8 MiB", http.StatusRequestEntityTooLarge)
		return
	}
	req = req.Clone(req.Context())
	req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))

	lock, _ := r.locks.LoadOrStore(repository, &sync.Mutex{})
	lock.(*sync.Mutex).Lock()
	defer lock.(*sync.Mutex).Unlock()
	answer := &recorder{header: w.Header(), status: http.StatusOK}
	r.olareg.ServeHTTP(answer, req)
	if answer.status >= 200 && answer.status < 300 {
		if err := r.hook.add(r.events(req, repository, reference, body, answer.header)); err != nil {
			r.log.ErrorContext(req.Context(), "push notification could not be stored", slog.String("repository", repository), slog.Any("error", err))
			http.Error(w, "the push notification could not be stored", http.StatusInternalServerError)
			return
		}
	}
	w.WriteHeader(answer.status)
	// The client is gone if this fails; what it asked for is done.
	_, _ = w.Write(answer.body.Bytes())
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

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }
