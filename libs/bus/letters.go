package bus

import (
	"cmp"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// What is done with dead letters is written behind them, as markers: records
// without a body, keyed by the letter so that all about one letter stand in one
// order. That order also decides between two who replay at once: a replay
// claims its letters, reads what stands there, and sends those whose claim came
// first (contracts/decisions/0045).
const (
	// claimTime is how long a claim holds others off.
	claimTime = 5 * time.Minute
	// chunkTime bounds the work on the letters of one claim; what the writer
	// has in hand by then it gives up well before claimTime.
	chunkTime   = time.Minute
	replayChunk = 100 // letters that are claimed and sent at once
	dropChunk   = 1000
	releaseTime = 5 * time.Second
	// searchSlack is how far the clocks of brokers and of those who replay may be apart.
	searchSlack = time.Minute
)

// DeadLetterFilter selects dead letters; the zero value selects all that were
// not dropped.
type DeadLetterFilter struct {
	IDs     []string      // these only
	Topic   string        // the topic they came from, with or without prefix and lane
	Service string        // that gave up
	Reason  string        // part of the reason
	Older   time.Duration // at least this old
	Younger time.Duration // at most this old
	Waiting bool          // only those that were neither replayed nor dropped
	Dropped bool          // also those that were dropped
	Limit   int           // at most this many, the oldest; 0: all
}

func (f DeadLetterFilter) matches(prefix string, d *contracts.DeadLetter, now time.Time) bool {
	age := now.Sub(d.Time)
	switch {
	case len(f.IDs) > 0 && !slices.Contains(f.IDs, d.ID):
		return false
	case f.Service != "" && f.Service != d.Service:
		return false
	case f.Reason != "" && !strings.Contains(d.Reason, f.Reason):
		return false
	case f.Older > 0 && age < f.Older, f.Younger > 0 && age > f.Younger:
		return false
	case f.Waiting && (d.Replayed || d.Dropped):
		return false
	case d.Dropped && !f.Dropped:
		return false
	}
	if f.Topic == "" {
		return true
	}
	base := strings.TrimSuffix(strings.TrimSuffix(d.Topic, deadLetterSuffix), "."+d.Service)
	originTopic, _, _ := strings.Cut(d.Origin, "/")
	for _, t := range []string{base, originTopic, d.Topic} {
		if t == f.Topic || t == prefix+f.Topic {
			return true
		}
	}
	return false
}

// claim says who replays a letter.
type claim struct {
	run   string // tells one replay from another
	by    string
	at    time.Time
	force bool // also what was replayed or dropped
}

// letter is a dead letter and what its markers say. Its body stays in Kafka.
type letter struct {
	contracts.DeadLetter
	origin origin
	known  bool // it was read itself, not only markers about it
	claim  claim
	over   bool      // the claim was given back
	unsure time.Time // not zero: since then a replay may have sent it without saying so
}

// id returns what the markers of a letter are keyed by.
func (l *letter) id() string { return fmt.Sprintf("%d/%d", l.Partition, l.Offset) }

// claimed applies a claim, in the order of the log.
func (l *letter) claimed(c claim) {
	if (l.Replayed || l.Dropped) && !c.force || l.claim.run == c.run {
		return
	}
	if l.claim.run != "" {
		if !l.over && c.at.Sub(l.claim.at) < claimTime {
			return // somebody has it in hand
		}
		if l.unsure.IsZero() {
			l.unsure = l.claim.at
		}
	}
	l.claim, l.over = c, false
}

// letters is what the dead letter topics say.
type letters struct {
	b    *Bus
	logs []*letterLog
	byID map[string]*letter
}

// letterLog is one partition of a dead letter topic, as far as it was read.
type letterLog struct {
	queue   *queue
	records []letterRecord
}

// letterRecord is a letter or a marker.
type letterRecord struct {
	offset int64
	about  *letter
}

// readLetters reads all dead letter topics.
func (b *Bus) readLetters(ctx context.Context) (*letters, error) {
	topics, err := b.topicsThat(ctx, func(topic string) bool {
		return strings.HasPrefix(topic, b.cfg.Prefix) && strings.HasSuffix(topic, deadLetterSuffix)
	})
	if err != nil {
		return nil, fmt.Errorf("dead letters: %w", err)
	}
	parts, err := b.partitions(ctx, func(topic string) bool { return contains(topics, topic) })
	if err != nil {
		return nil, fmt.Errorf("dead letters: %w", err)
	}
	all := &letters{b: b, byID: make(map[string]*letter)}
	for p := range parts {
		first, _, err := b.offsets(ctx, p)
		if err != nil {
			return nil, fmt.Errorf("dead letters: %w", err)
		}
		all.logs = append(all.logs, &letterLog{queue: newQueue(p, first)})
	}
	return all, all.update(ctx)
}

// update reads what came since.
func (a *letters) update(ctx context.Context) error {
	for _, log := range a.logs {
		_, end, err := a.b.offsets(ctx, log.queue.position)
		if err == nil {
			err = a.b.scanPartition(ctx, log.queue, end, func(m kafka.Message) error {
				log.records = append(log.records, letterRecord{m.Offset, a.apply(&m)})
				return nil
			})
		}
		if err != nil {
			return fmt.Errorf("dead letters: %w", err)
		}
	}
	return nil
}

// get returns the letter of an id, which may be yet to come.
func (a *letters) get(id string) *letter {
	l := a.byID[id]
	if l == nil {
		l = &letter{}
		a.byID[id] = l
	}
	return l
}

// apply takes in one record and returns the letter that it is or is about.
func (a *letters) apply(m *kafka.Message) *letter {
	c := claim{run: header(m, headerRun), by: header(m, headerBy), at: timeOf(m), force: header(m, headerForce) != ""}
	about := func(key string) *letter {
		if id := header(m, key); id != "" {
			return a.get(m.Topic + "/" + id)
		}
		return nil
	}
	if l := about(headerClaimed); l != nil {
		l.claimed(c)
		return l
	}
	if l := about(headerReleased); l != nil {
		l.over = l.over || l.claim.run == c.run
		return l
	}
	if l := about(headerReplayed); l != nil {
		l.Replayed, l.ReplayedAt, l.ReplayedBy = true, &c.at, c.by
		l.claim, l.unsure = claim{}, time.Time{}
		return l
	}
	if l := about(headerDropped); l != nil {
		if !l.Dropped {
			l.Dropped, l.DroppedAt, l.DroppedBy, l.DropReason = true, &c.at, c.by, header(m, headerReason)
		}
		return l
	}
	l := a.get(fmt.Sprintf("%s/%d/%d", m.Topic, m.Partition, m.Offset))
	l.read(m)
	return l
}

// timeOf returns when a letter or marker was written, as its writer says.
func timeOf(m *kafka.Message) time.Time {
	at, err := time.Parse(time.RFC3339Nano, header(m, headerTime))
	if err != nil {
		return m.Time
	}
	return at
}

// read takes in the letter itself; what markers said of it stays.
func (l *letter) read(m *kafka.Message) {
	l.known = true
	l.origin = originOf(m)
	l.ID = fmt.Sprintf("%s/%d/%d", m.Topic, m.Partition, m.Offset)
	l.Topic, l.Partition, l.Offset = m.Topic, m.Partition, m.Offset
	l.Service = header(m, headerService)
	l.Time = timeOf(m)
	l.Reason = header(m, headerReason)
	l.Attempts = headerInt(m, headerAttempts)
	l.EventType = header(m, headerEventType)
	l.Subject = header(m, headerSubject)
	if l.origin.topic != "" {
		l.Origin = fmt.Sprintf("%s/%d/%d", l.origin.topic, l.origin.partition, l.origin.offset)
	}
}

// selected returns the letters that the filter selects, oldest first, without
// regard to its limit.
func (a *letters) selected(f DeadLetterFilter) []*letter {
	now := time.Now()
	var out []*letter
	for _, l := range a.byID {
		if l.known && f.matches(a.b.cfg.Prefix, &l.DeadLetter, now) {
			out = append(out, l)
		}
	}
	slices.SortFunc(out, func(x, y *letter) int {
		return cmp.Or(x.Time.Compare(y.Time), cmp.Compare(x.Topic, y.Topic), cmp.Compare(x.Partition, y.Partition), cmp.Compare(x.Offset, y.Offset))
	})
	return out
}

// named returns an error that is ErrNotFound for the first id that is unknown.
func (a *letters) named(ids []string) error {
	for _, id := range ids {
		if l := a.byID[id]; l == nil || !l.known {
			return fmt.Errorf("%s: %w", id, ErrNotFound)
		}
	}
	return nil
}

func limited[T any](list []T, limit int) []T {
	if limit > 0 && len(list) > limit {
		return list[:limit]
	}
	return list
}

// ListDeadLetters returns the dead letters of all services that the filter
// selects, oldest first.
func (b *Bus) ListDeadLetters(ctx context.Context, f DeadLetterFilter) ([]contracts.DeadLetter, error) {
	all, err := b.readLetters(ctx)
	if err != nil {
		return nil, err
	}
	selected := limited(all.selected(f), f.Limit)
	out := make([]contracts.DeadLetter, len(selected))
	for i, l := range selected {
		out[i] = l.DeadLetter
	}
	return out, nil
}

// particulars is what tells two failures of one kind apart.
var particulars = regexp.MustCompile(`"[^"]*"|[^\s"]*sha256:[0-9a-f]{12,}|\b[0-9a-f]{16,}\b|\b\d+\.\d+\.\d+\.\d+(:\d+)?\b|\b\d{4,}\b`)

// SummarizeDeadLetters counts letters by topic, service and kind of reason, the
// most frequent first.
func SummarizeDeadLetters(list []contracts.DeadLetter) []contracts.DeadLetterSummary {
	type group struct{ topic, service, reason string }
	sums := make(map[group]*contracts.DeadLetterSummary)
	for i := range list {
		l := &list[i]
		g := group{l.Topic, l.Service, particulars.ReplaceAllString(l.Reason, "…")}
		s := sums[g]
		if s == nil {
			s = &contracts.DeadLetterSummary{Topic: g.topic, Service: g.service, Reason: g.reason, Oldest: l.Time, Newest: l.Time}
			sums[g] = s
		}
		s.Count++
		if l.Replayed {
			s.Replayed++
		}
		if l.Dropped {
			s.Dropped++
		}
		if l.Time.Before(s.Oldest) {
			s.Oldest = l.Time
		}
		if l.Time.After(s.Newest) {
			s.Newest = l.Time
		}
	}
	out := make([]contracts.DeadLetterSummary, 0, len(sums))
	for _, s := range sums {
		out = append(out, *s)
	}
	slices.SortFunc(out, func(x, y contracts.DeadLetterSummary) int {
		return cmp.Or(-cmp.Compare(x.Count, y.Count), cmp.Compare(x.Topic, y.Topic), cmp.Compare(x.Service, y.Service), cmp.Compare(x.Reason, y.Reason))
	})
	return out
}

// ReadDeadLetter returns one dead letter by its id, with its headers and the
// bytes of the message. ErrNotFound when there is none.
func (b *Bus) ReadDeadLetter(ctx context.Context, id string) (contracts.DeadLetter, map[string]string, []byte, error) {
	all, err := b.readLetters(ctx)
	if err == nil {
		err = all.named([]string{id})
	}
	if err != nil {
		return contracts.DeadLetter{}, nil, nil, err
	}
	l := all.byID[id]
	messages, err := b.bodies(ctx, []*letter{l})
	if err != nil {
		return contracts.DeadLetter{}, nil, nil, err
	}
	m, ok := messages[l]
	if !ok {
		return contracts.DeadLetter{}, nil, nil, fmt.Errorf("%s: %w", id, ErrNotFound)
	}
	headers := make(map[string]string)
	for _, h := range m.Headers {
		headers[h.Key] = string(h.Value)
	}
	return l.DeadLetter, headers, m.Value, nil
}

// bodies reads the messages of some letters; one that Kafka has deleted in the
// meantime is left out.
func (b *Bus) bodies(ctx context.Context, wanted []*letter) (map[*letter]kafka.Message, error) {
	type span struct{ first, end int64 }
	spans := make(map[position]span)
	byID := make(map[string]*letter, len(wanted))
	for _, l := range wanted {
		p := position{l.Topic, l.Partition}
		s, ok := spans[p]
		if !ok {
			s.first = l.Offset
		}
		spans[p] = span{min(s.first, l.Offset), max(s.end, l.Offset+1)}
		byID[l.ID] = l
	}
	out := make(map[*letter]kafka.Message, len(wanted))
	for p, s := range spans {
		err := b.scanPartition(ctx, newQueue(p, s.first), s.end, func(m kafka.Message) error {
			if l := byID[fmt.Sprintf("%s/%d/%d", m.Topic, m.Partition, m.Offset)]; l != nil {
				out[l] = m
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("dead letters of %s: %w", p.topic, err)
		}
	}
	return out, nil
}

// mark writes a marker behind each letter.
func (b *Bus) mark(ctx context.Context, list []*letter, what string, c claim, more ...kafka.Header) error {
	msgs := make([]kafka.Message, len(list))
	for i, l := range list {
		msgs[i] = kafka.Message{Topic: l.Topic, Key: []byte(l.id()), Headers: append([]kafka.Header{
			{Key: what, Value: []byte(l.id())},
			{Key: headerRun, Value: []byte(c.run)},
			{Key: headerBy, Value: []byte(c.by)},
			{Key: headerTime, Value: []byte(c.at.Format(time.RFC3339Nano))},
		}, more...)}
		if c.force {
			msgs[i].Headers = append(msgs[i].Headers, kafka.Header{Key: headerForce, Value: []byte("true")})
		}
	}
	return b.write(ctx, msgs)
}

// ReplayResult says what became of the dead letters that were selected.
type ReplayResult struct {
	Sent     int // put back into their topics
	Found    int // found there: sent by a replay that ended before it could say so
	Replayed int // left out: replayed before
	Dropped  int // left out: dropped
	Raw      int // left out: bodies that never were events
	Busy     int // left out: another replay has them in hand
	Gone     int // left out: Kafka has deleted them in the meantime
}

// ReplayDeadLetters puts the messages that the filter selects back into the
// topics they came from; by says who asks for it. What was replayed or dropped
// before is left out unless force is set. It may be repeated, and run by two at
// once: each letter is sent by one of them, and what a killed replay has sent is
// found (after claimTime) and not sent again. A replay that is held up for
// longer than that may double an event, which consumers do not mind.
//
// A letter that is named by its id and cannot be replayed is an error:
// ErrNotFound, ErrNotReplayable (a body that never was an event), or
// ErrDropped without force; then nothing is sent.
//
// When ctx ends, the letters in hand (at most replayChunk) are finished.
func (b *Bus) ReplayDeadLetters(ctx context.Context, f DeadLetterFilter, by string, force bool) (ReplayResult, error) {
	var res ReplayResult
	all, err := b.readLetters(ctx)
	if err == nil {
		err = all.named(f.IDs)
	}
	if err != nil {
		return res, err
	}
	f.Dropped = true
	var wanted []*letter
	for _, l := range all.selected(f) {
		switch {
		case l.origin.topic == "" && len(f.IDs) > 0:
			return ReplayResult{}, fmt.Errorf("%s is a body that was never an event: %w", l.ID, ErrNotReplayable)
		case l.Dropped && !force && len(f.IDs) > 0:
			return ReplayResult{}, fmt.Errorf("%s, by %s at %s: %w", l.ID, l.DroppedBy, l.DroppedAt.UTC().Format(time.RFC3339), ErrDropped)
		case l.Dropped && !force:
			res.Dropped++
		case l.origin.topic == "":
			res.Raw++
		case l.Replayed && !force:
			res.Replayed++
		default:
			wanted = append(wanted, l)
		}
	}
	c := claim{run: crand.Text(), by: by, force: force}
	for chunk := range slices.Chunk(limited(wanted, f.Limit), replayChunk) {
		if ctx.Err() != nil {
			return res, fmt.Errorf("replay: %w", ctx.Err())
		}
		if err := b.replay(ctx, all, chunk, c, &res); err != nil {
			return res, fmt.Errorf("replay: %w", err)
		}
	}
	return res, nil
}

// replay claims some letters and sends those that it was given.
func (b *Bus) replay(ctx context.Context, all *letters, chunk []*letter, c claim, res *ReplayResult) error {
	// Neither half sent nor unmarked because somebody is in a hurry.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), chunkTime)
	defer cancel()
	c.at = time.Now().UTC()
	if err := b.mark(ctx, chunk, headerClaimed, c); err != nil {
		return fmt.Errorf("claim: %w", err)
	}
	if err := all.update(ctx); err != nil {
		b.release(ctx, chunk, c)
		return err
	}
	var mine []*letter
	for _, l := range chunk {
		switch {
		case l.claim.run == c.run:
			mine = append(mine, l)
		case l.Replayed:
			res.Replayed++
		case l.Dropped:
			res.Dropped++
		default:
			res.Busy++
		}
	}
	sent, err := b.sentAlready(ctx, mine)
	var messages map[*letter]kafka.Message
	if err == nil {
		messages, err = b.bodies(ctx, mine)
	}
	if err != nil {
		b.release(ctx, mine, c)
		return err
	}
	var again []kafka.Message
	var done []*letter
	found := 0
	for _, l := range mine {
		m, ok := messages[l]
		switch {
		case sent[l.ID]:
			found++
		case !ok:
			res.Gone++
			continue
		default:
			again = append(again, kafka.Message{
				Topic: l.origin.topic, Key: m.Key, Value: m.Value,
				Headers: append(foreignHeaders(&m), kafka.Header{Key: headerReplayOf, Value: []byte(l.ID)}),
			})
		}
		done = append(done, l)
	}
	// From here on the claim is not given back: what was sent is not known.
	if err := b.write(ctx, again); err != nil {
		return err
	}
	res.Sent += len(again)
	res.Found += found
	if err := b.mark(ctx, done, headerReplayed, c); err != nil {
		return fmt.Errorf("remember it: %w", err)
	}
	return nil
}

// release gives claims back before anything was sent; what cannot be given back
// ends by itself.
func (b *Bus) release(ctx context.Context, list []*letter, c claim) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTime)
	defer cancel()
	if err := b.mark(ctx, list, headerReleased, c); err != nil {
		b.log.WarnContext(ctx, "claims on dead letters were not given back, they end by themselves", "after", claimTime, "error", err)
	}
}

// sentAlready returns the ids of those letters that a replay, which did not say
// how it ended, has put into their topics.
func (b *Bus) sentAlready(ctx context.Context, list []*letter) (map[string]bool, error) {
	since := make(map[string]time.Time) // by topic
	for _, l := range list {
		if l.unsure.IsZero() {
			continue
		}
		if at, ok := since[l.origin.topic]; !ok || l.unsure.Before(at) {
			since[l.origin.topic] = l.unsure
		}
	}
	sent := make(map[string]bool)
	for topic, at := range since {
		parts, err := b.partitions(ctx, func(t string) bool { return t == topic })
		if err != nil {
			return nil, err
		}
		for p := range parts {
			first, end, err := b.offsetsSince(ctx, p, at.Add(-searchSlack))
			if err != nil {
				return nil, err
			}
			err = b.scanPartition(ctx, newQueue(p, first), end, func(m kafka.Message) error {
				if id := header(&m, headerReplayOf); id != "" {
					sent[id] = true
				}
				return nil
			})
			if err != nil {
				return nil, fmt.Errorf("look for what was sent to %s: %w", topic, err)
			}
		}
	}
	for _, l := range list {
		if l.unsure.IsZero() {
			delete(sent, l.ID) // of a replay before the last one
		}
	}
	return sent, nil
}

// offsetsSince returns the first offset of a partition that was written at or
// after a time, and the one after its last.
func (b *Bus) offsetsSince(ctx context.Context, p position, at time.Time) (first, end int64, err error) {
	_, end, err = b.offsets(ctx, p)
	if err != nil {
		return 0, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	res, err := b.client.ListOffsets(ctx, &kafka.ListOffsetsRequest{Topics: map[string][]kafka.OffsetRequest{
		p.topic: {kafka.TimeOffsetOf(p.partition, at)},
	}})
	if err != nil {
		return 0, 0, fmt.Errorf("offsets of %s/%d at %s: %w", p.topic, p.partition, at, err)
	}
	first = end
	for _, o := range res.Topics[p.topic] {
		if o.Error != nil {
			return 0, 0, fmt.Errorf("offsets of %s/%d at %s: %w", p.topic, p.partition, at, o.Error)
		}
		for offset := range o.Offsets {
			if offset >= 0 {
				first = min(first, offset)
			}
		}
	}
	return first, end, nil
}

// DropResult says what became of the dead letters that were selected.
type DropResult struct {
	Dropped int // now
	Before  int // dropped before
	Purged  int // deleted from Kafka
}

// DropDeadLetters marks the letters that the filter selects as dropped: with
// the time, who says so and why. They stay where they are, out of sight, until
// retention deletes them. With purge, Kafka is asked to delete at once what
// stands in their topics before the first letter that was not dropped: it can
// delete nothing else. An id that does not exist is ErrNotFound.
func (b *Bus) DropDeadLetters(ctx context.Context, f DeadLetterFilter, by, why string, purge bool) (DropResult, error) {
	var res DropResult
	all, err := b.readLetters(ctx)
	if err == nil {
		err = all.named(f.IDs)
	}
	if err != nil {
		return res, err
	}
	f.Dropped = true
	var wanted []*letter
	topics := make(map[string]bool)
	for _, l := range all.selected(f) {
		topics[l.Topic] = true
		if l.Dropped {
			res.Before++
			continue
		}
		wanted = append(wanted, l)
	}
	c := claim{by: by, at: time.Now().UTC()}
	for chunk := range slices.Chunk(limited(wanted, f.Limit), dropChunk) {
		if err := b.mark(ctx, chunk, headerDropped, c, kafka.Header{Key: headerReason, Value: []byte(Redact(why))}); err != nil {
			return res, fmt.Errorf("drop: %w", err)
		}
		res.Dropped += len(chunk)
	}
	if !purge {
		return res, nil
	}
	if err := all.update(ctx); err != nil {
		return res, err
	}
	for _, log := range all.logs {
		if !topics[log.queue.topic] {
			continue
		}
		n, end := log.prefix()
		if n == 0 {
			continue
		}
		if err := b.deleteRecords(ctx, log.queue.position, end); err != nil {
			return res, fmt.Errorf("delete dropped letters: %w", err)
		}
		res.Purged += n
	}
	return res, nil
}

// prefix returns how many letters stand in a partition before the first that
// was not dropped, and the offset up to which only they and their markers do.
func (log *letterLog) prefix() (n int, end int64) {
	for _, r := range log.records {
		l := r.about
		switch {
		case !l.known: // the letter is gone, the marker may go
		case !l.Dropped, l.Partition != log.queue.partition:
			return n, end
		case l.Offset == r.offset:
			n++
		}
		end = r.offset + 1
	}
	return n, end
}

// errDeleteRecords explains the refusals that an operator will meet.
func errDeleteRecords(code kafka.Error) error {
	if errors.Is(code, kafka.TopicAuthorizationFailed) {
		return fmt.Errorf("%w: deleting records needs the Delete operation on the topic", code)
	}
	return code
}

// topicsThat returns the names of the topics that exist and are asked for.
func (b *Bus) topicsThat(ctx context.Context, want func(string) bool) ([]string, error) {
	if err := b.refresh(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	meta, err := b.client.Metadata(ctx, &kafka.MetadataRequest{})
	if err != nil {
		return nil, fmt.Errorf("read topics: %w", err)
	}
	var names []string
	for _, t := range meta.Topics {
		if t.Error == nil && want(t.Name) {
			names = append(names, t.Name)
		}
	}
	return names, nil
}
