package hook

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/google/cel-go/common/types/traits"
	"github.com/google/cel-go/ext"
)

// Mapping says, for a sender of no known kind, how its bodies are read: each
// field is a CEL expression (cel.dev) over
//
//	body     the JSON value, or the fields of a form
//	headers  the call's headers by lower-case name, without Authorization and cookies
//	event    one element of Events, or body where Events is not set
//
// with CEL's standard functions and the extensions for strings, base64 and
// optional values. A field that an expression asks for and the body lacks is
// "not said".
type Mapping struct {
	Events     string `yaml:"events"`     // a list; each element is an event
	Action     string `yaml:"action"`     // a word: push, delete or ignore, or one like pushed, created, removed
	Registry   string `yaml:"registry"`   // host[:port] or a URL
	Repository string `yaml:"repository"` // below the registry
	Tag        string `yaml:"tag"`
	Digest     string `yaml:"digest"`
	ID         string `yaml:"id"`   // of the event, the same when it is sent again
	Time       string `yaml:"time"` // RFC 3339, a timestamp, or seconds since 1970
}

// Limits of a mapping. Costs are in CEL's own units, about one an operation; a usual
// mapping costs about 50 an event.
const (
	maxExpression     = 4096 // code points
	maxExpressionCost = 50_000
	maxMappingCost    = 200_000 // of one body
)

// ErrMapping is returned for an expression that cannot be used.
var ErrMapping = errors.New("not a usable expression")

// Mapper is a compiled Mapping.
type Mapper struct {
	events cel.Program // nil: the body is the one event
	fields []mapped
}

// mapped is one field's expression.
type mapped struct {
	name    string
	program cel.Program
	numbers bool // it may be a number
	set     func(*Event, string)
}

// Compile checks every expression and returns what decodes bodies with them.
// Errors: ErrMapping, each with the name of its expression.
func (m Mapping) Compile() (*Mapper, error) {
	env, err := cel.NewEnv(
		cel.Variable("body", cel.DynType),
		cel.Variable("event", cel.DynType),
		cel.Variable("headers", cel.MapType(cel.StringType, cel.StringType)),
		ext.Strings(), ext.Encoders(), cel.OptionalTypes(),
		cel.ParserExpressionSizeLimit(maxExpression), cel.ParserRecursionLimit(32),
	)
	if err != nil {
		return nil, fmt.Errorf("set up CEL: %w", err)
	}
	var problems []error
	program := func(name, text string, allowed ...*cel.Type) cel.Program {
		p, err := compile(env, text, allowed)
		if err != nil {
			problems = append(problems, fmt.Errorf("mapping.%s: %w", name, err))
		}
		return p
	}
	var out Mapper
	if m.Events != "" {
		out.events = program("events", m.Events, cel.ListType(cel.DynType))
	}
	if m.Action == "" {
		problems = append(problems, fmt.Errorf("mapping.action is missing: %w", ErrMapping))
	}
	if m.Repository == "" {
		problems = append(problems, fmt.Errorf("mapping.repository is missing: %w", ErrMapping))
	}
	if m.Tag == "" && m.Digest == "" {
		problems = append(problems, fmt.Errorf("mapping.tag and mapping.digest are missing, one is needed: %w", ErrMapping))
	}
	for _, f := range []struct {
		name, text string
		numbers    bool
		set        func(*Event, string)
	}{
		{"action", m.Action, false, (*Event).setMappedAction},
		{"registry", m.Registry, false, func(e *Event, v string) { e.Registry = v }},
		{"repository", m.Repository, false, func(e *Event, v string) { e.Repository = v }},
		{"tag", m.Tag, false, func(e *Event, v string) { e.Tag = v }},
		{"digest", m.Digest, false, func(e *Event, v string) { e.Digest = v }},
		{"id", m.ID, true, func(e *Event, v string) { e.DeliveryID = v }},
		{"time", m.Time, true, func(e *Event, v string) { e.Time = mappedTime(v) }},
	} {
		if f.text == "" {
			continue
		}
		allowed := []*cel.Type{cel.StringType}
		if f.numbers {
			allowed = append(allowed, cel.TimestampType, cel.IntType, cel.DoubleType)
		}
		out.fields = append(out.fields, mapped{f.name, program(f.name, f.text, allowed...), f.numbers, f.set})
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	return &out, nil
}

func compile(env *cel.Env, text string, allowed []*cel.Type) (cel.Program, error) {
	ast, issues := env.Compile(text)
	if err := issues.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrMapping)
	}
	gives := ast.OutputType()
	fits := func(t *cel.Type) bool {
		return t.IsAssignableType(gives) || cel.OptionalType(t).IsAssignableType(gives)
	}
	if !gives.IsEquivalentType(cel.DynType) && !gives.IsEquivalentType(cel.OptionalType(cel.DynType)) && !slices.ContainsFunc(allowed, fits) {
		return nil, fmt.Errorf("it gives %s, and %s is needed: %w", gives, allowed[0], ErrMapping)
	}
	program, err := env.Program(ast, cel.CostLimit(maxExpressionCost), cel.EvalOptions(cel.OptOptimize, cel.OptTrackCost))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrMapping)
	}
	return program, nil
}

func decodeGeneric(req Request) ([]Event, error) {
	if req.Mapper == nil {
		return nil, fmt.Errorf("the source has no mapping: %w", ErrUnreadable)
	}
	return req.Mapper.decode(req)
}

func (m *Mapper) decode(req Request) ([]Event, error) {
	body, err := anyBody(req)
	if err != nil {
		return nil, err
	}
	run := evaluation{headers: plainHeaders(req.Header), body: body, left: maxMappingCost}
	elements := []any{body}
	if m.events != nil {
		v, err := run.eval(m.events, body)
		if err != nil {
			return nil, fmt.Errorf("mapping.events: %w: %w", err, ErrUnreadable)
		}
		if elements, err = list(v); err != nil {
			return nil, fmt.Errorf("mapping.events: %w: %w", err, ErrUnreadable)
		}
	}
	if len(elements) > MaxEvents {
		return nil, fmt.Errorf("%d events, more than %d: %w", len(elements), MaxEvents, ErrUnreadable)
	}
	events := make([]Event, 0, len(elements))
	whole := sha256.Sum256(req.Body)
	for i, element := range elements {
		events = append(events, m.event(&run, element).finish(req, fmt.Appendf(whole[:], "#%d", i)))
	}
	return events, nil
}

func (m *Mapper) event(run *evaluation, element any) Event {
	var e Event
	for _, f := range m.fields {
		v, err := run.eval(f.program, element)
		if err != nil {
			return bad(fmt.Sprintf("mapping.%s: %v", f.name, err))
		}
		s, err := text(v, f.numbers)
		if err != nil {
			return bad(fmt.Sprintf("mapping.%s: %v", f.name, err))
		}
		f.set(&e, s)
	}
	if e.Action == "" {
		return bad("mapping.action says nothing of this event")
	}
	return e
}

// setMappedAction takes the usual words for what happened.
func (e *Event) setMappedAction(word string) {
	if word == "" {
		return
	}
	action, ok := verb(strings.ToLower(word))
	if word == string(Ignore) {
		action, ok = Ignore, true
	}
	e.Action = action
	switch {
	case !ok:
		*e = e.ignored(fmt.Sprintf("the action %q is neither a push nor a deletion", clean(word, 32)))
	case action == Ignore:
		e.Reason = fmt.Sprintf("the action %q: nothing was pushed or deleted", clean(word, 32))
	case action == Push:
		e.Reason = "the mapping says that something was pushed"
	case action == Delete:
		e.Reason = "the mapping says that something was deleted"
	}
}

// evaluation evaluates expressions over one body, within one budget.
type evaluation struct {
	body    any
	headers map[string]string
	left    uint64
}

// eval returns null for what the body does not have. Its errors say nothing
// that stands in the body.
func (r *evaluation) eval(p cel.Program, element any) (ref.Val, error) {
	if r.left == 0 {
		return nil, fmt.Errorf("the expressions cost more than %d for this body", maxMappingCost)
	}
	v, details, err := p.Eval(map[string]any{"body": r.body, "headers": r.headers, "event": element})
	if details != nil && details.ActualCost() != nil {
		r.left -= min(r.left, *details.ActualCost())
	}
	switch {
	case err == nil:
		return v, nil
	case strings.Contains(err.Error(), "no such key"), strings.Contains(err.Error(), "index out of bounds"):
		return types.NullValue, nil
	case strings.Contains(err.Error(), "cost limit"):
		return nil, fmt.Errorf("it costs more than %d for this body", maxExpressionCost)
	case strings.Contains(err.Error(), "no such overload"):
		return nil, errors.New("the body holds another type than it expects")
	default:
		return nil, errors.New("it fails for this body")
	}
}

// list takes a list out of a value; null is an empty one.
func list(v ref.Val) ([]any, error) {
	v = inside(v)
	if v == types.NullValue {
		return nil, nil
	}
	l, ok := v.(traits.Lister)
	if !ok {
		return nil, errors.New("it gives no list for this body")
	}
	var out []any
	for it := l.Iterator(); it.HasNext() == types.True; {
		out = append(out, it.Next())
	}
	return out, nil
}

// text takes a text out of a value; null is "".
func text(v ref.Val, numbers bool) (string, error) {
	switch v := inside(v).(type) {
	case types.Null:
		return "", nil
	case types.String:
		return string(v), nil
	case types.Timestamp:
		return v.UTC().Format(time.RFC3339Nano), nil
	case types.Int:
		if numbers {
			return strconv.FormatInt(int64(v), 10), nil
		}
	case types.Double:
		if numbers {
			return strconv.FormatFloat(float64(v), 'f', -1, 64), nil
		}
	}
	return "", errors.New("it gives no text for this body")
}

// mappedTime reads RFC 3339 or seconds since 1970.
func mappedTime(s string) time.Time {
	seconds, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return parseTime(s)
	}
	if seconds <= 0 || seconds > 9e9 { // beyond the year 2255 it is no number of seconds
		return time.Time{}
	}
	return time.Unix(0, int64(seconds*1e9)).UTC()
}

// inside takes a value out of an optional one.
func inside(v ref.Val) ref.Val {
	if o, ok := v.(*types.Optional); ok {
		if !o.HasValue() {
			return types.NullValue
		}
		return o.GetValue()
	}
	return v
}

// anyBody reads JSON, or a form whose fields are texts.
func anyBody(req Request) (any, error) {
	mediaType, _, _ := mime.ParseMediaType(req.Header.Get("Content-Type"))
	if mediaType == "application/x-www-form-urlencoded" {
		form, err := url.ParseQuery(string(req.Body))
		if err != nil {
			return nil, fmt.Errorf("not a form: %w", ErrUnreadable)
		}
		fields := map[string]any{}
		for name, values := range form {
			fields[name] = values[0]
		}
		return fields, nil
	}
	var body any
	if err := decodeJSON(req.Body, &body); err != nil {
		return nil, err
	}
	return body, nil
}

// plainHeaders leaves out those that hold a secret wherever they are set.
func plainHeaders(h http.Header) map[string]string {
	out := map[string]string{}
	for name, values := range h {
		switch name {
		case "Authorization", "Proxy-Authorization", "Cookie":
		default:
			out[strings.ToLower(name)] = values[0]
		}
	}
	return out
}
