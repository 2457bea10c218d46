package hook

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// ecrEvent is an event of ECR as EventBridge delivers it (docs.aws.amazon.com,
// Amazon ECR user guide, "Amazon ECR events and EventBridge").
type ecrEvent struct {
	ID         string `json:"id"`
	DetailType string `json:"detail-type"`
	Source     string `json:"source"`
	Account    string `json:"account"`
	Region     string `json:"region"`
	Time       string `json:"time"`
	Detail     struct {
		Result             string `json:"result"`
		SyncStatus         string `json:"sync-status"` // of pull-through caches
		ActionType         string `json:"action-type"`
		RepositoryName     string `json:"repository-name"`
		ImageDigest        string `json:"image-digest"`
		ImageTag           string `json:"image-tag"`
		ManifestMediaType  string `json:"manifest-media-type"`
		ArtifactMediaType  string `json:"artifact-media-type"` // of the config
		TargetStorageClass string `json:"target-storage-class"`
	} `json:"detail"`
}

// awsEnvelope is what may stand around an event: a message of SNS
// (docs.aws.amazon.com, SNS, "Parsing Amazon SNS message formats"), or a record
// of SQS as EventBridge Pipes and Lambda hand it on.
type awsEnvelope struct {
	Type      string            `json:"Type"`
	MessageID string            `json:"MessageId"`
	TopicARN  string            `json:"TopicArn"`
	Message   string            `json:"Message"`
	Body      *string           `json:"body"`
	Records   []json.RawMessage `json:"Records"`
	// SpecVersion is that of a CloudEvent that an input transformer made.
	SpecVersion string `json:"specversion"`
}

// maxEnvelopes bounds how deep envelopes are opened: Records, SQS, SNS, event.
const maxEnvelopes = 4

func decodeECR(req Request) ([]Event, error) {
	if req.Header.Get("Ce-Specversion") != "" {
		return readCloudEvents(req, ecrCloudEvent)
	}
	return ecrEvents(req, req.Body, maxEnvelopes)
}

// ecrEvents opens envelopes until events are found.
func ecrEvents(req Request, raw []byte, depth int) ([]Event, error) {
	if depth == 0 {
		return nil, fmt.Errorf("more than %d envelopes around each other: %w", maxEnvelopes, ErrUnreadable)
	}
	if strings.HasPrefix(strings.TrimLeft(string(raw), " \t\r\n"), "[") {
		var list []json.RawMessage
		if err := decodeJSON(raw, &list); err != nil {
			return nil, err
		}
		return ecrList(req, list, depth-1)
	}
	var envelope awsEnvelope
	if err := decodeJSON(raw, &envelope); err != nil {
		return nil, err
	}
	switch {
	case envelope.Records != nil:
		return ecrList(req, envelope.Records, depth-1)
	case envelope.Body != nil:
		return ecrEvents(req, []byte(*envelope.Body), depth-1)
	case envelope.Type == "Notification" && envelope.TopicARN != "":
		return ecrEvents(req, []byte(envelope.Message), depth-1)
	case envelope.TopicARN != "" && envelope.Type == "SubscriptionConfirmation": // as a queue of another account gets it
		return []Event{bad(unconfirmedSNS).finish(req, raw)}, nil
	case envelope.TopicARN != "": // that a subscription has ended
		return nil, nil
	case envelope.SpecVersion != "":
		return cloudEventStructured(req, raw, ecrCloudEvent)
	}
	var in ecrEvent
	if err := decodeJSON(raw, &in); err != nil {
		return nil, err
	}
	if in.DetailType == "" {
		return nil, fmt.Errorf("no field \"detail-type\": %w", ErrUnreadable)
	}
	return []Event{in.event().finish(req, raw)}, nil
}

func ecrList(req Request, list []json.RawMessage, depth int) ([]Event, error) {
	var events []Event
	for _, raw := range list {
		some, err := ecrEvents(req, raw, depth)
		if err != nil {
			some = []Event{bad(err.Error()).finish(req, raw)}
		}
		if events = append(events, some...); len(events) > MaxEvents {
			return nil, fmt.Errorf("more than %d events: %w", MaxEvents, ErrUnreadable)
		}
	}
	return events, nil
}

func (in *ecrEvent) event() Event {
	e := Event{
		Registry:   ecrHost(in.Account, in.Region),
		Repository: in.Detail.RepositoryName,
		Tag:        in.Detail.ImageTag,
		Digest:     in.Detail.ImageDigest,
		MediaType:  in.Detail.ManifestMediaType,
		Time:       parseTime(in.Time),
		DeliveryID: in.ID,
	}
	if !contracts.ValidDigest(e.Digest) && in.Detail.ActionType != "DELETE" { // some are cut short; the tag is resolved
		e.Digest = ""
	}
	shown := clean(in.DetailType, 64)
	if in.Source != "aws.ecr" {
		return e.ignored("the event is not one of ECR")
	}
	switch in.DetailType {
	case "ECR Image Action", "ECR Referrer Action", "ECR Artifact Action", "ECR Replication Action":
		if in.Detail.Result != "SUCCESS" {
			return e.ignored(shown + " that did not succeed")
		}
	case "ECR Pull Through Cache Action":
		if in.Detail.SyncStatus != "SUCCESS" {
			return e.ignored(shown + " that did not succeed")
		}
		e.Action, e.Reason = Push, "the pull-through cache took an image over"
		return in.kindOf(e)
	default: // scans, API calls
		return e.ignored(shown + ": nothing was pushed or deleted")
	}
	switch {
	case in.Detail.ActionType == "PUSH":
		e.Action, e.Reason = Push, "an image was pushed"
	case in.Detail.ActionType == "REPLICATE": // told where the copy arrived
		e.Action, e.Reason = Push, "an image was replicated to here"
	case in.Detail.ActionType == "UPDATE_STORAGE_CLASS" && in.Detail.TargetStorageClass == "STANDARD":
		e.Action, e.Reason = Push, "an image came back from the archive"
	case in.Detail.ActionType == "DELETE":
		e.Action, e.Reason = Delete, "an image or tag was deleted"
		return e
	default:
		return e.ignored(fmt.Sprintf("%s %s: nothing was pushed or deleted", shown, clean(in.Detail.ActionType, 32)))
	}
	return in.kindOf(e)
}

// kindOf tells images from other artifacts by what newer events say of them.
func (in *ecrEvent) kindOf(e Event) Event {
	artifact := in.Detail.ArtifactMediaType
	switch {
	case in.DetailType == "ECR Referrer Action", in.DetailType == "ECR Artifact Action":
		return e.notAnImage(in.DetailType + ": a signature, an SBOM or the like")
	case in.Detail.ManifestMediaType != "" && manifestKind(in.Detail.ManifestMediaType) == "":
		return e.notAnImage("the media type is not one of an image manifest or index")
	case artifact != "" && !isImageConfig(artifact) && manifestKind(artifact) == "":
		return e.notAnImage("its config is " + clean(artifact, maxMediaType))
	}
	return e
}

// ecrCloudEvent reads a CloudEvent that an input transformer of EventBridge
// made of ECR's event: the account and region stand in the source, which is the
// repository's ARN or a URN like it.
func ecrCloudEvent(in *cloudEvent) (Event, error) {
	e, err := in.event("")
	if err != nil {
		return Event{}, err
	}
	e.DeliveryID = in.ID // EventBridge's, which is unique by itself
	if part := strings.Split(in.Source, ":"); len(part) >= 6 && part[2] == "ecr" {
		e.Registry = ecrHost(part[4], part[3])
	}
	return e, nil
}

var (
	awsAccount = regexp.MustCompile(`^[0-9]{12}$`)
	awsRegion  = regexp.MustCompile(`^[a-z]{2,4}(?:-[a-z]+){1,2}-[0-9]{1,2}$`)
)

// awsDomains are those of the partitions that have one of their own, by what
// their regions' names start with (botocore, partitions.json).
var awsDomains = []struct{ region, domain string }{
	{"cn-", "amazonaws.com.cn"},
	{"eusc-", "amazonaws.eu"},
	{"us-isob-", "sc2s.sgov.gov"},
	{"us-isof-", "csp.hci.ic.gov"},
	{"eu-isoe-", "cloud.adc-e.uk"},
	{"us-iso-", "c2s.ic.gov"},
}

// AWSDomain returns the domain of a region's hosts, "" for what is no region.
func AWSDomain(region string) string {
	if !awsRegion.MatchString(region) {
		return ""
	}
	for _, d := range awsDomains {
		if strings.HasPrefix(region, d.region) {
			return d.domain
		}
	}
	return "amazonaws.com"
}

// ecrHost returns the host of an account's registry in a region, "" for what
// cannot be one.
func ecrHost(account, region string) string {
	domain := AWSDomain(region)
	if domain == "" || !awsAccount.MatchString(account) {
		return ""
	}
	return account + ".dkr.ecr." + region + "." + domain
}

// ecrHostPattern are the hosts of a registry, those for FIPS and for both
// families of addresses among them (docs.aws.amazon.com, Amazon ECR user guide,
// "Making requests to Amazon ECR registries").
var ecrHostPattern = regexp.MustCompile(`^([0-9]{12})\.dkr(?:\.ecr|-ecr)(?:-fips)?\.([a-z0-9-]+)\.`)

// foreignECR: a registry is an account in a region, whichever of its hosts is
// bound. A bound host that is none of them stands before one.
func foreignECR(said, bound string) bool {
	is, of := ecrHostPattern.FindStringSubmatch(said), ecrHostPattern.FindStringSubmatch(bound)
	return is != nil && of != nil && (is[1] != of[1] || is[2] != of[2])
}

// unconfirmedSNS is what is left to be done where the authentication "sns",
// which confirms subscriptions, is not used. Nothing proves whose URL it is.
const unconfirmedSNS = "a subscription waits to be confirmed: open the SubscribeURL in this body by hand, or set auth.sns and let SNS ask again"

// ecrHandshake accepts the confirmations of SNS, which tell of no image.
func ecrHandshake(req Request) (Answer, bool) {
	switch req.Header.Get("X-Amz-Sns-Message-Type") {
	case "SubscriptionConfirmation":
		return Answer{Status: http.StatusOK, Left: unconfirmedSNS}, true
	case "UnsubscribeConfirmation":
		return Answer{Status: http.StatusOK}, true
	}
	return Answer{}, false
}
