package intake

// Reason codes of calls. They are part of the API: codes are added, never renamed.
const (
	reasonStored     = "stored"
	reasonIgnored    = "ignored"
	reasonFiltered   = "filtered"
	reasonDuplicate  = "duplicate"
	reasonHandshake  = "handshake"
	reasonUnreadable = "unreadable"
	reasonIncomplete = "incomplete"
	reasonNotStored  = "not-stored"
	reasonTooLarge   = "too-large"
	reasonBrokenOff  = "broken-off"
	reasonRefused    = "unauthorized"
	reasonUnchecked  = "unchecked"
	reasonUnknown    = "unknown-source"
	reasonClosed     = "closed"
)

// Reason says what a reason code of the delivery log means.
type Reason struct {
	Code  string
	Means string // one sentence
	Do    string // what to do about it; empty: nothing
	// Failure: something is to be mended, here or at the sender.
	Failure bool
}

// Reasons lists every reason code.
func Reasons() []Reason {
	return []Reason{
		{
			reasonStored, "What the call said is stored and goes on to planner.",
			"If no scan follows, ask for the image: tidewaiter where REF.", false,
		},
		{reasonIgnored, "The call said nothing that concerns an image: a blob, a pull, a quota or test event.", "", false},
		{
			reasonFiltered, "The source's registry, paths, repositories or tags leave out everything the call was about.",
			"If it should be scanned, widen them in the section sources of the configuration; a registry needs a source of its own, or anyRegistry.", false,
		},
		{
			reasonDuplicate, "The sender sent again what is stored already.",
			"If it happens all the time, the sender does not get our answers in time: look at its time-out and at the network.", false,
		},
		{reasonHandshake, "The sender asked whether it may send, and it may.", "", false},
		{
			reasonUnreadable, "The body is not what this kind of source sends; it is kept as a dead letter.",
			"Compare the source's kind with what the registry sends: tidewaiter dlq show prints the body, tidewaiter webhook decode reads it.", true,
		},
		{
			reasonIncomplete, "Some events of the body name no registry, repository, tag or digest that can be right, or ask for something that a person must do; the others are stored, the body is kept as a dead letter.",
			"Look at the trouble of the call. If no registry is named, set the source's registry; else see tidewaiter dlq show.", true,
		},
		{
			reasonNotStored, "Kafka did not take it in time, so the sender was told to try again.",
			"Look at Kafka and at intake's readiness. What a sender does not repeat, the sweeper finds.", true,
		},
		{
			reasonTooLarge, "The body is bigger than intake.maxBody, or one that is submitted by hand than 64 KiB.",
			"Raise intake.maxBody, to 4194304 at most, or have the sender send fewer events at once.", true,
		},
		{
			reasonBrokenOff, "The connection ended before the whole body was there.",
			"Look at time-outs of the sender and of proxies between.", true,
		},
		{
			reasonRefused, "The call did not prove that it comes from the source.",
			"Put the same secret into the registry's webhook and into the source's file or variable; while you replace one, both may stand there, one a line.", true,
		},
		{
			reasonUnchecked, "The proof could not be checked, since the issuer's keys or the signer's certificate could not be fetched; the sender was told to try again.",
			"See intake's log for why; the network must let it reach the issuer (auth.oidc) or SNS in the topic's region (auth.sns).", true,
		},
		{
			reasonUnknown, "The URL names no configured source.",
			"Correct the URL at the sender (/hooks/<source-id>), or add the source to the section sources.", true,
		},
		{
			reasonClosed, "Submitting by hand is closed, since no admin token is configured.",
			"Set intake.admin.", true,
		},
	}
}

func reasonOf(code string) Reason {
	for _, r := range Reasons() {
		if r.Code == code {
			return r
		}
	}
	return Reason{Code: code}
}
