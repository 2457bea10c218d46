package bus

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/binding/format"
	"github.com/cloudevents/sdk-go/v2/binding/spec"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// The Kafka binding of CloudEvents (cloudevents/spec, bindings/kafka-protocol-binding.md,
// v1.0.2): attributes of binary mode travel in headers with this prefix.
const (
	headerPrefix      = "ce_"
	headerContentType = "content-type"
)

// message reads a Kafka message as a CloudEvent, in either content mode.
type message struct {
	headers map[string][]byte
	value   []byte
	format  format.Format // structured mode
	version spec.Version  // binary mode
}

var (
	_ binding.Message               = (*message)(nil)
	_ binding.MessageMetadataReader = (*message)(nil)
)

// newMessage wraps m. It never fails: what is no CloudEvent has EncodingUnknown.
func newMessage(m *kafka.Message) *message {
	msg := &message{headers: make(map[string][]byte, len(m.Headers)), value: m.Value}
	for _, h := range m.Headers {
		msg.headers[strings.ToLower(h.Key)] = h.Value
	}
	contentType := string(msg.headers[headerContentType])
	if format.IsFormat(contentType) {
		msg.format = format.Lookup(contentType)
		return msg
	}
	versions := spec.WithPrefix(headerPrefix)
	msg.version = versions.Version(string(msg.headers[versions.PrefixedSpecVersionName()]))
	return msg
}

// ReadEncoding implements binding.MessageReader.
func (m *message) ReadEncoding() binding.Encoding {
	switch {
	case m.format != nil:
		return binding.EncodingStructured
	case m.version != nil:
		return binding.EncodingBinary
	default:
		return binding.EncodingUnknown
	}
}

// ReadStructured implements binding.MessageReader.
func (m *message) ReadStructured(ctx context.Context, w binding.StructuredWriter) error {
	if m.format == nil {
		return binding.ErrNotStructured
	}
	return w.SetStructuredEvent(ctx, m.format, bytes.NewReader(m.value))
}

// ReadBinary implements binding.MessageReader.
func (m *message) ReadBinary(_ context.Context, w binding.BinaryWriter) error {
	if m.version == nil {
		return binding.ErrNotBinary
	}
	for name, value := range m.headers {
		var err error
		switch attr := m.version.Attribute(name); {
		case attr != nil:
			err = w.SetAttribute(attr, string(value))
		case name == headerContentType:
			err = w.SetAttribute(m.version.AttributeFromKind(spec.DataContentType), string(value))
		case strings.HasPrefix(name, headerPrefix):
			err = w.SetExtension(strings.TrimPrefix(name, headerPrefix), string(value))
		}
		if err != nil {
			return fmt.Errorf("header %s: %w", name, err)
		}
	}
	if m.value == nil {
		return nil
	}
	return w.SetData(bytes.NewReader(m.value))
}

// Finish implements binding.Message; there is nothing to release.
func (m *message) Finish(error) error { return nil }

// GetAttribute implements binding.MessageMetadataReader.
func (m *message) GetAttribute(kind spec.Kind) (spec.Attribute, any) {
	attr := m.version.AttributeFromKind(kind)
	if attr == nil {
		return nil, nil
	}
	name := attr.PrefixedName()
	if kind == spec.DataContentType {
		name = headerContentType
	}
	value, ok := m.headers[name]
	if !ok {
		return attr, nil
	}
	return attr, string(value)
}

// GetExtension implements binding.MessageMetadataReader.
func (m *message) GetExtension(name string) any {
	value, ok := m.headers[headerPrefix+strings.ToLower(name)]
	if !ok {
		return nil
	}
	return string(value)
}

// writer fills a Kafka message from a CloudEvent, in either content mode.
type writer struct{ m *kafka.Message }

var (
	_ binding.StructuredWriter = (*writer)(nil)
	_ binding.BinaryWriter     = (*writer)(nil)
)

// writeMessage encodes in into out. A message keeps its content mode; ctx says
// which one an event gets (binding.WithForceStructured).
func writeMessage(ctx context.Context, in binding.Message, out *kafka.Message, transformers ...binding.Transformer) error {
	w := &writer{m: out}
	_, err := binding.Write(ctx, in, w, w, transformers...)
	if err != nil {
		return fmt.Errorf("write a CloudEvent as a Kafka message: %w", err)
	}
	return nil
}

// SetStructuredEvent implements binding.StructuredWriter.
func (w *writer) SetStructuredEvent(_ context.Context, f format.Format, ev io.Reader) error {
	value, err := io.ReadAll(ev)
	if err != nil {
		return err
	}
	w.setHeader(headerContentType, f.MediaType())
	w.m.Value = value
	return nil
}

// Start implements binding.BinaryWriter.
func (w *writer) Start(context.Context) error { return nil }

// SetAttribute implements binding.BinaryWriter.
func (w *writer) SetAttribute(attr spec.Attribute, value any) error {
	name := headerPrefix + strings.ToLower(attr.Name())
	if attr.Kind() == spec.DataContentType {
		name = headerContentType
	}
	return w.set(name, value)
}

// SetExtension implements binding.BinaryWriter. The partitionkey extension is
// the message's key (kafka-protocol-binding.md, "Key Mapping").
func (w *writer) SetExtension(name string, value any) error {
	if strings.EqualFold(name, contracts.ExtKey) && value != nil {
		key, err := types.Format(value)
		if err != nil {
			return err
		}
		w.m.Key = []byte(key)
	}
	return w.set(headerPrefix+strings.ToLower(name), value)
}

// SetData implements binding.BinaryWriter.
func (w *writer) SetData(data io.Reader) error {
	value, err := io.ReadAll(data)
	if err != nil {
		return err
	}
	w.m.Value = value
	return nil
}

// End implements binding.BinaryWriter.
func (w *writer) End(context.Context) error { return nil }

func (w *writer) set(name string, value any) error {
	if value == nil {
		w.dropHeader(name)
		return nil
	}
	s, err := types.Format(value)
	if err != nil {
		return err
	}
	w.setHeader(name, s)
	return nil
}

func (w *writer) setHeader(name, value string) {
	w.dropHeader(name)
	w.m.Headers = append(w.m.Headers, kafka.Header{Key: name, Value: []byte(value)})
}

func (w *writer) dropHeader(name string) {
	kept := w.m.Headers[:0]
	for _, h := range w.m.Headers {
		if h.Key != name {
			kept = append(kept, h)
		}
	}
	w.m.Headers = kept
}

// encodeEvent returns ev as a Kafka message in structured mode, keyed by its
// partitionkey extension, or its subject where that is absent. An event that
// is not valid is an error.
func encodeEvent(ctx context.Context, ev *event.Event) (kafka.Message, error) {
	if err := ev.Validate(); err != nil {
		return kafka.Message{}, fmt.Errorf("event %s %s is not valid: %w", ev.Type(), ev.ID(), err)
	}
	var m kafka.Message
	if err := writeMessage(binding.WithForceStructured(ctx), (*binding.EventMessage)(ev), &m); err != nil {
		return kafka.Message{}, err
	}
	key := ev.Subject()
	if k, ok := ev.Extensions()[contracts.ExtKey]; ok {
		s, err := types.Format(k)
		if err != nil {
			return kafka.Message{}, fmt.Errorf("key of event %s: %w", ev.ID(), err)
		}
		key = s
	}
	if key != "" {
		m.Key = []byte(key)
	}
	return m, nil
}

// decodeEvent reads a Kafka message of either content mode. Whatever is not a
// valid CloudEvent is an error.
func decodeEvent(ctx context.Context, m *kafka.Message) (event.Event, error) {
	ev, err := binding.ToEvent(ctx, newMessage(m))
	if err != nil {
		return event.Event{}, fmt.Errorf("read a Kafka message as a CloudEvent: %w", err)
	}
	if err := ev.Validate(); err != nil {
		return event.Event{}, fmt.Errorf("read a Kafka message as a CloudEvent: %w", err)
	}
	return *ev, nil
}
