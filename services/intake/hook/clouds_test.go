package hook_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// decodeCase is a body of a kind and what must come of it.
type decodeCase struct {
	header map[string]string
	body   string
	want   []want
	id     string // of the first event, where the sender gives one
	at     string // time of the first event
}

func checkKind(t *testing.T, kind string, cases map[string]decodeCase) {
	t.Helper()
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			h := http.Header{}
			for k, v := range c.header {
				h.Set(k, v)
			}
			events, err := hook.Decode(kind, hook.Request{Header: h, Body: []byte(c.body)})
			if err != nil {
				t.Fatal(err)
			}
			if len(events) != len(c.want) {
				t.Fatalf("%d events, want %d: %+v", len(events), len(c.want), events)
			}
			for i, e := range events {
				if got(e) != c.want[i] {
					t.Errorf("event %d: got %+v, want %+v (%s)", i, got(e), c.want[i], e.Reason)
				}
			}
			if c.id != "" && events[0].DeliveryID != c.id {
				t.Errorf("delivery id %q, want %q", events[0].DeliveryID, c.id)
			}
			if c.at != "" && events[0].Time.Format(time.RFC3339Nano) != c.at {
				t.Errorf("time %s, want %s", events[0].Time.Format(time.RFC3339Nano), c.at)
			}
		})
	}
}

func TestZot(t *testing.T) {
	header := func(typ string) map[string]string {
		return map[string]string{
			"Ce-Specversion": "1.0", "Ce-Id": "z1", "Ce-Source": "zotregistry.dev", "Ce-Type": typ,
			"Ce-Time": "2026-02-03T04:05:06.7Z", "Content-Type": "application/json",
		}
	}
	const updated = "zotregistry.image.updated"
	manifest := func(config, layer string) string {
		return strconv.Quote(`{"mediaType":"` + ociManifest + `","config":{"mediaType":"` + config + `"},"layers":[{"mediaType":"` + layer + `"}]}`)
	}
	layer, config := "application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.oci.image.config.v1+json"
	checkKind(t, "zot", map[string]decodeCase{
		"image with a tag": {
			header: header(updated),
			body: `{"name":"team/app","reference":"2.0","digest":"` + digestA + `","mediaType":"` + ociManifest + `","manifest":` + manifest(config, layer) +
				`,"actor":{"name":"ci"}}`,
			want: []want{{"push", "", "team/app", "2.0", digestA, false, false}}, id: "z1", at: "2026-02-03T04:05:06.7Z",
		},
		"by digest, which is repeated as the reference": {
			header: header(updated),
			body:   `{"name":"team/app","reference":"` + digestA + `","digest":"` + digestA + `","mediaType":"` + ociManifest + `"}`,
			want:   []want{{"push", "", "team/app", "", digestA, false, false}},
		},
		"index": {
			header: header(updated),
			body:   `{"name":"team/app","reference":"2.0","digest":"` + digestA + `","mediaType":"` + ociIndex + `","manifest":"{}"}`,
			want:   []want{{"push", "", "team/app", "2.0", digestA, false, false}},
		},
		"chart by the manifest in it": {
			header: header(updated),
			body: `{"name":"charts/x","reference":"1","digest":"` + digestA + `","mediaType":"` + ociManifest + `","manifest":` +
				manifest("application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.chart.content.v1.tar+gzip") + `}`,
			want: []want{{"ignore", "", "charts/x", "1", digestA, true, false}},
		},
		"odd config but an image layer": {
			header: header(updated),
			body: `{"name":"a/b","reference":"1","digest":"` + digestA + `","mediaType":"` + ociManifest + `","manifest":` +
				manifest("application/vnd.example.config", layer) + `}`,
			want: []want{{"push", "", "a/b", "1", digestA, false, false}},
		},
		"signature tag": {
			header: header(updated),
			body:   `{"name":"a/b","reference":"` + sigTag + `.sig","digest":"` + digestA + `","mediaType":"` + ociManifest + `"}`,
			want:   []want{{"ignore", "", "a/b", sigTag + ".sig", digestA, true, false}},
		},
		"tag deleted": {
			header: header("zotregistry.image.deleted"),
			body:   `{"name":"a/b","reference":"1","digest":"` + digestA + `","mediaType":"` + ociManifest + `"}`,
			want:   []want{{"delete", "", "a/b", "1", digestA, false, false}},
		},
		"repository created, which is no push": {
			header: header("zotregistry.repository.created"), body: `{"name":"a/b"}`,
			want: []want{{"ignore", "", "a/b", "", "", false, false}},
		},
		"lint failed": {
			header: header("zotregistry.image.lint_failed"), body: `{"name":"a/b","reference":"1"}`,
			want: []want{{"ignore", "", "a/b", "1", "", false, false}},
		},
		"structured mode": {
			header: map[string]string{"Content-Type": "application/cloudevents+json"},
			body:   `{"specversion":"1.0","id":"z2","source":"zotregistry.dev","type":"` + updated + `","data":{"name":"a/b","reference":"1"}}`,
			want:   []want{{"push", "", "a/b", "1", "", false, false}}, id: "z2",
		},
	})
}

func TestECR(t *testing.T) {
	event := func(detailType, region, detail string) string {
		return `{"version":"0","id":"e-1","detail-type":"` + detailType + `","source":"aws.ecr","account":"210987654321",` +
			`"time":"2026-01-02T03:04:05Z","region":"` + region + `","resources":[],"detail":` + detail + `}`
	}
	pushed := func(more string) string {
		return `{"result":"SUCCESS","action-type":"PUSH","repository-name":"team/app","image-digest":"` + digestA + `","image-tag":"1"` + more + `}`
	}
	const host = "210987654321.dkr.ecr.eu-central-1.amazonaws.com"
	image := want{"push", host, "team/app", "1", digestA, false, false}
	plain := event("ECR Image Action", "eu-central-1", pushed(""))
	notification := func(inner string) string {
		return `{"Type":"Notification","MessageId":"m-1","TopicArn":"arn:aws:sns:eu-central-1:210987654321:t","Message":` + strconv.Quote(inner) +
			`,"Timestamp":"2026-01-02T03:04:06Z","SignatureVersion":"2"}`
	}
	checkKind(t, "ecr", map[string]decodeCase{
		"push":                         {body: plain, want: []want{image}, id: "e-1", at: "2026-01-02T03:04:05Z"},
		"in SNS, by the inner id":      {body: notification(plain), want: []want{image}, id: "e-1"},
		"in SQS and SNS":               {body: `{"messageId":"q","body":` + strconv.Quote(notification(plain)) + `}`, want: []want{image}, id: "e-1"},
		"records of SQS":               {body: `{"Records":[{"messageId":"q","body":` + strconv.Quote(plain) + `},{"body":"x"}]}`, want: []want{image, {"ignore", "", "", "", "", false, true}}},
		"a list":                       {body: `[` + plain + `,` + plain + `]`, want: []want{image, image}},
		"confirmation":                 {body: `{"Type":"SubscriptionConfirmation","TopicArn":"arn:aws:sns:eu-central-1:210987654321:t","SubscribeURL":"https://x.invalid/"}`, want: []want{{"ignore", "", "", "", "", false, true}}},
		"end of a subscription":        {body: `{"Type":"UnsubscribeConfirmation","TopicArn":"arn:aws:sns:eu-central-1:210987654321:t"}`, want: []want{}},
		"delete by a digest cut short": {body: strings.NewReplacer("PUSH", "DELETE", digestA, digestA[:67], `"image-tag":"1"`, `"x":""`).Replace(plain), want: []want{{"delete", host, "team/app", "", "", false, true}}},
		"without a tag":                {body: strings.Replace(plain, `"image-tag":"1"`, `"image-tag":""`, 1), want: []want{{"push", host, "team/app", "", digestA, false, false}}},
		"with a digest cut short":      {body: strings.Replace(plain, digestA, digestA[:67], 1), want: []want{{"push", host, "team/app", "1", "", false, false}}},
		"that failed":                  {body: strings.Replace(plain, "SUCCESS", "FAILURE", 1), want: []want{{"ignore", host, "team/app", "1", digestA, false, false}}},
		"of another service":           {body: strings.Replace(plain, "aws.ecr", "aws.s3", 1), want: []want{{"ignore", host, "team/app", "1", digestA, false, false}}},
		"account that is none":         {body: strings.Replace(plain, "210987654321", "evil.example/", 1), want: []want{{"push", "", "team/app", "1", digestA, false, false}}},
		"region that is none":          {body: event("ECR Image Action", "x.evil.example", pushed("")), want: []want{{"push", "", "team/app", "1", digestA, false, false}}},
		"China":                        {body: event("ECR Image Action", "cn-northwest-1", pushed("")), want: []want{{"push", "210987654321.dkr.ecr.cn-northwest-1.amazonaws.com.cn", "team/app", "1", digestA, false, false}}},
		"GovCloud":                     {body: event("ECR Image Action", "us-gov-west-1", pushed("")), want: []want{{"push", "210987654321.dkr.ecr.us-gov-west-1.amazonaws.com", "team/app", "1", digestA, false, false}}},
		"European Sovereign Cloud":     {body: event("ECR Image Action", "eusc-de-east-1", pushed("")), want: []want{{"push", "210987654321.dkr.ecr.eusc-de-east-1.amazonaws.eu", "team/app", "1", digestA, false, false}}},
		"index":                        {body: event("ECR Image Action", "eu-central-1", pushed(`,"manifest-media-type":"`+ociIndex+`"`)), want: []want{image}},
		"image by its config":          {body: event("ECR Image Action", "eu-central-1", pushed(`,"manifest-media-type":"`+ociManifest+`","artifact-media-type":"application/vnd.docker.container.image.v1+json"`)), want: []want{image}},
		"chart by its config":          {body: event("ECR Image Action", "eu-central-1", pushed(`,"artifact-media-type":"application/vnd.cncf.helm.config.v1+json"`)), want: []want{{"ignore", host, "team/app", "1", digestA, true, false}}},
		"referrer":                     {body: event("ECR Referrer Action", "eu-central-1", pushed("")), want: []want{{"ignore", host, "team/app", "1", digestA, true, false}}},
		"artifact manifest":            {body: event("ECR Image Action", "eu-central-1", pushed(`,"manifest-media-type":"application/vnd.cncf.oras.artifact.manifest.v1+json"`)), want: []want{{"ignore", host, "team/app", "1", digestA, true, false}}},
		"delete":                       {body: strings.Replace(plain, "PUSH", "DELETE", 1), want: []want{{"delete", host, "team/app", "1", digestA, false, false}}},
		"into the archive":             {body: strings.Replace(plain, `"PUSH"`, `"UPDATE_STORAGE_CLASS","target-storage-class":"ARCHIVE"`, 1), want: []want{{"ignore", host, "team/app", "1", digestA, false, false}}},
		"back from the archive":        {body: strings.Replace(plain, `"PUSH"`, `"UPDATE_STORAGE_CLASS","target-storage-class":"STANDARD"`, 1), want: []want{image}},
		"replication":                  {body: event("ECR Replication Action", "eu-central-1", `{"result":"SUCCESS","repository-name":"team/app","image-digest":"`+digestA+`","source-account":"210987654321","action-type":"REPLICATE","source-region":"us-west-2","image-tag":"1"}`), want: []want{image}},
		"replication that failed":      {body: event("ECR Replication Action", "eu-central-1", `{"result":"FAILED","repository-name":"team/app","action-type":"REPLICATE","image-tag":"1"}`), want: []want{{"ignore", host, "team/app", "1", "", false, false}}},
		"pull-through cache":           {body: event("ECR Pull Through Cache Action", "eu-central-1", `{"rule-version":"1","sync-status":"SUCCESS","ecr-repository-prefix":"hub","repository-name":"hub/alpine","upstream-registry-url":"registry-1.docker.io","image-tag":"3","image-digest":"`+digestB+`"}`), want: []want{{"push", host, "hub/alpine", "3", digestB, false, false}}},
		"pull-through that failed":     {body: event("ECR Pull Through Cache Action", "eu-central-1", `{"sync-status":"FAILED","repository-name":"hub/alpine","image-tag":"3"}`), want: []want{{"ignore", host, "hub/alpine", "3", "", false, false}}},
		"scan result":                  {body: event("ECR Image Scan", "eu-central-1", `{"scan-status":"COMPLETE","repository-name":"team/app","image-digest":"`+digestA+`","image-tags":["1"]}`), want: []want{{"ignore", host, "team/app", "", digestA, false, false}}},
		"API call":                     {body: event("AWS API Call via CloudTrail", "eu-central-1", `{"eventName":"PutImage"}`), want: []want{{"ignore", host, "", "", "", false, false}}},
		"transformed to CloudEvent":    {body: `{"specversion":"1.0","id":"t-1","type":"com.amazon.ecr.image.push","source":"arn:aws-cn:ecr:cn-north-1:210987654321:repository/app","data":{"repositoryName":"app","imageTag":"v2"}}`, want: []want{{"push", "210987654321.dkr.ecr.cn-north-1.amazonaws.com.cn", "app", "v2", "", false, false}}, id: "t-1"},
	})
}

func TestECREnvelopesEnd(t *testing.T) {
	body := "x"
	for range 6 {
		body = `{"body":` + strconv.Quote(body) + `}`
	}
	if _, err := hook.Decode("ecr", hook.Request{Body: []byte(body)}); !errors.Is(err, hook.ErrUnreadable) || !strings.Contains(err.Error(), "envelopes") {
		t.Errorf("got %v", err)
	}
}

func TestGAR(t *testing.T) {
	const repo = "europe-docker.pkg.dev/proj/repo/app"
	envelope := func(data, id, at string) string {
		return fmt.Sprintf(`{"message":{"data":%q,%s,%s},"subscription":"projects/p/subscriptions/s"}`,
			base64.StdEncoding.EncodeToString([]byte(data)), id, at)
	}
	both := `{"action":"INSERT","digest":"` + repo + `@` + digestA + `","tag":"` + repo + `:1"}`
	image := want{"push", "europe-docker.pkg.dev", "proj/repo/app", "1", digestA, false, false}
	checkKind(t, "gar", map[string]decodeCase{
		"push envelope":            {body: envelope(both, `"messageId":"7"`, `"publishTime":"2026-01-02T03:04:05.6Z"`), want: []want{image}, id: "7", at: "2026-01-02T03:04:05.6Z"},
		"old names":                {body: envelope(both, `"message_id":"8"`, `"publish_time":"2026-01-02T03:04:05Z"`), want: []want{image}, id: "8", at: "2026-01-02T03:04:05Z"},
		"unwrapped, or pulled":     {header: map[string]string{hook.PubSubMessageID: "9", hook.PubSubPublishTime: "2026-01-02T03:04:05Z"}, body: both, want: []want{image}, id: "9", at: "2026-01-02T03:04:05Z"},
		"digest only":              {body: `{"action":"INSERT","digest":"` + repo + `@` + digestA + `"}`, want: []want{{"push", "europe-docker.pkg.dev", "proj/repo/app", "", digestA, false, false}}},
		"tag only":                 {body: `{"action":"INSERT","tag":"eu.gcr.io/proj/app:1"}`, want: []want{{"push", "eu.gcr.io", "proj/app", "1", "", false, false}}},
		"tag without the path":     {body: `{"action":"INSERT","digest":"` + repo + `@` + digestA + `","tag":"app:1"}`, want: []want{image}},
		"tag alone":                {body: `{"action":"INSERT","digest":"` + repo + `@` + digestA + `","tag":"1"}`, want: []want{image}},
		"tag of another path":      {body: `{"action":"INSERT","digest":"` + repo + `@` + digestA + `","tag":"gcr.io/other/app:1"}`, want: []want{{"push", "europe-docker.pkg.dev", "proj/repo/app", "", digestA, false, false}}},
		"domain-scoped project":    {body: `{"action":"INSERT","tag":"gcr.io/example.com/proj/app:1"}`, want: []want{{"push", "gcr.io", "example.com/proj/app", "1", "", false, false}}},
		"signature":                {body: `{"action":"INSERT","digest":"` + repo + `@` + digestB + `","tag":"` + repo + `:` + sigTag + `.sig"}`, want: []want{{"ignore", "europe-docker.pkg.dev", "proj/repo/app", sigTag + ".sig", digestB, true, false}}},
		"tag removed":              {body: `{"action":"DELETE","tag":"` + repo + `:1"}`, want: []want{{"delete", "europe-docker.pkg.dev", "proj/repo/app", "1", "", false, false}}},
		"image removed":            {body: `{"action":"DELETE","digest":"` + repo + `@` + digestA + `"}`, want: []want{{"delete", "europe-docker.pkg.dev", "proj/repo/app", "", digestA, false, false}}},
		"another action":           {body: `{"action":"VIEW","tag":"` + repo + `:1"}`, want: []want{{"ignore", "europe-docker.pkg.dev", "proj/repo/app", "1", "", false, false}}},
		"digest that is cut short": {body: `{"action":"INSERT","digest":"` + repo + `@sha256:abc","tag":"` + repo + `:1"}`, want: []want{{"push", "europe-docker.pkg.dev", "proj/repo/app", "1", "", false, false}}},
	})
	for name, body := range map[string]string{
		"not base64": `{"message":{"data":"%%"}}`, "no data": `{"message":{"attributes":{"a":"b"}}}`, "no action": `{"tag":"a:1"}`,
		"data that is a list": envelope(`[1]`, `"messageId":"1"`, `"publishTime":""`),
	} {
		if events, err := hook.Decode("gar", hook.Request{Body: []byte(body)}); !errors.Is(err, hook.ErrUnreadable) {
			t.Errorf("%s: got %v, %v", name, events, err)
		}
	}
}

func TestOCIR(t *testing.T) {
	event := func(typ, name, path string) string {
		return `{"eventType":"com.oraclecloud.artifacts.` + typ + `","cloudEventsVersion":"0.1","eventTime":"2026-01-02T03:04:05Z","eventID":"o-1",` +
			`"data":{"resourceName":"` + name + `","additionalDetails":{"path":"` + path + `","digest":"` + digestA + `"}}}`
	}
	checkKind(t, "ocir", map[string]decodeCase{
		"push":               {body: event("uploaddockerimage", "team/app:1", "ns/team/app"), want: []want{{"push", "", "ns/team/app", "1", digestA, false, false}}, id: "o-1", at: "2026-01-02T03:04:05Z"},
		"without a tag":      {body: event("uploaddockerimage", "team/app", "ns/team/app"), want: []want{{"push", "", "ns/team/app", "", digestA, false, false}}},
		"without the path":   {body: event("uploaddockerimage", "team/app:1", ""), want: []want{{"push", "", "", "1", digestA, false, false}}},
		"delete":             {body: event("deletecontainerimage", "team/app:1", "ns/team/app"), want: []want{{"delete", "", "ns/team/app", "1", digestA, false, false}}},
		"tag removed":        {body: event("removecontainerversion", "team/app:1", "ns/team/app"), want: []want{{"delete", "", "ns/team/app", "1", digestA, false, false}}},
		"repository deleted": {body: event("deletedockerrepository", "team/app", "ns/team/app"), want: []want{{"delete", "", "ns/team/app", "", "", false, false}}},
		"manifest read":      {body: event("readdockerrepositorymanifest", "team/app:1", "ns/team/app"), want: []want{{"ignore", "", "ns/team/app", "1", digestA, false, false}}},
		"signature":          {body: event("uploaddockerimage", "team/app:"+sigTag+".sig", "ns/team/app"), want: []want{{"ignore", "", "ns/team/app", sigTag + ".sig", digestA, true, false}}},
		// Set aside, so that a person finds the URL; never followed.
		"confirmation":                    {body: `{"ConfirmationURL":"https://cell1.notification.us-phoenix-1.oci.oraclecloud.com/x"}`, want: []want{{"ignore", "", "", "", "", false, true}}},
		"confirmation by its header":      {header: map[string]string{"X-OCI-NS-MessageType": "SubscriptionConfirmation"}, body: `{}`, want: []want{{"ignore", "", "", "", "", false, true}}},
		"notification, which has one too": {header: map[string]string{"X-OCI-NS-MessageType": "Notification"}, body: event("uploaddockerimage", "team/app:1", "ns/team/app"), want: []want{{"push", "", "ns/team/app", "1", digestA, false, false}}},
	})
}

func TestAlibaba(t *testing.T) {
	trigger := func(name, region string) string {
		return `{"push_data":{"digest":"` + digestA + `","pushed_at":"2026-01-02 11:04:05","tag":"1"},"repository":{"name":"App","namespace":"team",` +
			`"region":"` + region + `","repo_full_name":"` + name + `"}}`
	}
	completed := func(what string) string {
		return `{"id":"a-1","source":"acs.cr","specversion":"1.0","time":"2026-01-02T11:04:05+08:00","type":"cr:Artifact:` + what + `",` +
			`"data":{"InstanceName":"i","RepoNamespaceName":"team","RepoName":"app","RegionId":"cn-hangzhou","Tag":"1"}}`
	}
	checkKind(t, "alibaba-acr", map[string]decodeCase{
		"trigger, in lower case, China's time": {
			body: trigger("team/App", "cn-beijing"), at: "2026-01-02T03:04:05Z",
			want: []want{{"push", "registry.cn-beijing.aliyuncs.com", "team/app", "1", digestA, false, false}},
		},
		"trigger without the full name": {body: trigger("", "cn-beijing"), want: []want{{"push", "registry.cn-beijing.aliyuncs.com", "team/app", "1", digestA, false, false}}},
		"trigger of an instance":        {body: trigger("team/app", ""), want: []want{{"push", "", "team/app", "1", digestA, false, false}}},
		"region that makes no host":     {body: trigger("team/app", "x/../y"), want: []want{{"push", "", "team/app", "1", digestA, false, false}}},
		"push of EventBridge":           {body: completed("PushCompleted"), want: []want{{"push", "", "team/app", "1", "", false, false}}, id: "a-1", at: "2026-01-02T03:04:05Z"},
		"build, whose push follows":     {body: completed("BuildCompleted"), want: []want{{"ignore", "", "team/app", "1", "", false, false}}},
		"scan":                          {body: completed("ScanCompleted"), want: []want{{"ignore", "", "team/app", "1", "", false, false}}},
		"a batch":                       {body: `[` + completed("PushCompleted") + `]`, want: []want{{"push", "", "team/app", "1", "", false, false}}},
		"binary mode": {
			header: map[string]string{"Ce-Specversion": "1.0", "Ce-Id": "b", "Ce-Type": "cr:Artifact:PushCompleted"},
			body:   `{"RepoNamespaceName":"team","RepoName":"app","Tag":"1","Digest":"` + digestB + `"}`,
			want:   []want{{"push", "", "team/app", "1", digestB, false, false}}, id: "b",
		},
	})
}

func TestMirantis(t *testing.T) {
	event := func(typ string) string {
		return `{"type":"` + typ + `","createdAt":"2026-01-02T03:04:05.5Z","contents":{"namespace":"team","repository":"app","tag":"1","digest":"` +
			digestA + `","author":"ci"},"location":"/repositories/team/app/tags/1"}`
	}
	full := func(action string) []want { return []want{{action, "", "team/app", "1", digestA, false, false}} }
	checkKind(t, "mirantis-dtr", map[string]decodeCase{
		"tag push":        {body: event("TAG_PUSH"), want: full("push"), at: "2026-01-02T03:04:05.5Z"},
		"manifest push":   {body: event("MANIFEST_PUSH"), want: full("push")},
		"tag delete":      {body: event("TAG_DELETE"), want: full("delete")},
		"manifest delete": {body: event("MANIFEST_DELETE"), want: full("delete")},
		"repo deleted":    {body: event("REPO_DELETED"), want: []want{{"delete", "", "team/app", "", "", false, false}}},
		"mirrored here":   {body: event("POLL_MIRRORING"), want: full("push")},
		"mirrored, but what": {
			body: `{"type":"POLL_MIRRORING","contents":{"namespace":"team","repository":"app"}}`,
			want: []want{{"ignore", "", "team/app", "", "", false, false}},
		},
		"pull":      {body: event("TAG_PULL"), want: full("ignore")},
		"scan":      {body: event("SCAN_COMPLETED"), want: full("ignore")},
		"promotion": {body: event("PROMOTION"), want: full("ignore")},
		"namespace without repository": {
			body: `{"type":"REPO_UPDATED","contents":{"namespace":"team"}}`, want: []want{{"ignore", "", "", "", "", false, false}},
		},
	})
}

func TestICR(t *testing.T) {
	event := func(action, outcome, target string) string {
		return `{"eventTime":"2026-01-02T03:04:05.25+0000","action":"container-registry.image.` + action + `","outcome":"` + outcome +
			`","initiator":{"name":"ci@example.com"},"target":{"name":"` + target + `"},"requestData":{"digest":"` + digestB + `"}}`
	}
	const image = "de.icr.io/ns/app:1"
	full := func(action string) []want { return []want{{action, "de.icr.io", "ns/app", "1", "", false, false}} }
	checkKind(t, "ibm-icr", map[string]decodeCase{
		"push":           {body: event("push", "success", image), want: full("push"), at: "2026-01-02T03:04:05.25Z"},
		"tag":            {body: event("tag", "success", image), want: full("push")},
		"by digest":      {body: event("push", "success", "de.icr.io/ns/app@"+digestA), want: []want{{"push", "de.icr.io", "ns/app", "", digestA, false, false}}},
		"delete":         {body: event("delete", "success", image), want: full("delete")},
		"untag":          {body: event("untag", "success", image), want: full("delete")},
		"that failed":    {body: event("push", "failure", image), want: full("ignore")},
		"pull":           {body: event("pull", "success", image), want: full("ignore")},
		"bulk delete":    {body: event("bulkdelete", "success", "many"), want: []want{{"ignore", "", "", "", "", false, false}}},
		"of a namespace": {body: `{"action":"container-registry.namespace.create","outcome":"success"}`, want: []want{{"ignore", "", "", "", "", false, false}}},
		"a list":         {body: `[` + event("push", "success", image) + `,7]`, want: append(full("push"), want{"ignore", "", "", "", "", false, true})},
	})
}

func TestCloudsUnreadable(t *testing.T) {
	many := `[` + strings.Repeat("{},", hook.MaxEvents) + `{}]`
	for _, kind := range []string{"zot", "ecr", "gar", "ocir", "alibaba-acr", "ibm-icr", "mirantis-dtr", "generic"} {
		for _, body := range []string{"", "hello", "{}", "7", `"x"`, many} {
			events, err := hook.Decode(kind, hook.Request{Header: http.Header{}, Body: []byte(body)})
			if body == many && kind == "ecr" && err == nil {
				t.Errorf("%s takes more than %d events", kind, hook.MaxEvents)
			}
			if err != nil && !errors.Is(err, hook.ErrUnreadable) || err == nil && body != many {
				t.Errorf("%s %.10q: got %v, %v, want ErrUnreadable", kind, body, events, err)
			}
		}
	}
}

func fuzzKind(f *testing.F, kind string, header http.Header, seeds ...string) {
	f.Helper()
	for _, s := range seeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		checkDecoded(t, kind, hook.Request{Header: header.Clone(), Body: body})
	})
}

func FuzzZot(f *testing.F) {
	fuzzKind(f, "zot", http.Header{"Ce-Specversion": {"1.0"}, "Ce-Type": {"zotregistry.image.updated"}},
		`{"name":"a/b","reference":"1","digest":"`+digestA+`","mediaType":"`+ociManifest+`","manifest":"{\"config\":{\"mediaType\":\"x\"}}"}`)
}

func FuzzECR(f *testing.F) {
	fuzzKind(f, "ecr", http.Header{},
		`{"id":"1","detail-type":"ECR Image Action","source":"aws.ecr","account":"210987654321","region":"eu-central-1","detail":{"result":"SUCCESS","action-type":"PUSH","repository-name":"a","image-tag":"1"}}`,
		`{"Type":"Notification","TopicArn":"t","Message":"{\"detail-type\":\"x\"}"}`, `{"Records":[{"body":"[{}]"}]}`, `{"specversion":"1.0","type":"a.push","source":"arn:aws:ecr:x:y:z"}`)
}

func FuzzGAR(f *testing.F) {
	fuzzKind(f, "gar", http.Header{}, `{"action":"INSERT","digest":"gcr.io/a/b@`+digestA+`","tag":"b:1"}`, `{"message":{"data":"e30=","messageId":"1"}}`)
}

func FuzzOCIR(f *testing.F) {
	fuzzKind(f, "ocir", http.Header{}, `{"eventType":"com.oraclecloud.artifacts.uploaddockerimage","data":{"resourceName":"a:1","additionalDetails":{"path":"n/a"}}}`, `{"ConfirmationURL":"x"}`)
}

func FuzzAlibaba(f *testing.F) {
	fuzzKind(f, "alibaba-acr", http.Header{}, `{"push_data":{"tag":"1","pushed_at":"2026-01-02 11:04:05"},"repository":{"repo_full_name":"A/b","region":"cn-x"}}`,
		`{"push_data":{"tag":"1","pushed_at":"0000-01-01 00:00:00"},"repository":{"repo_full_name":"a/b"}}`,
		`{"specversion":"1.0","type":"cr:Artifact:PushCompleted","data":{"RepoName":"a"}}`)
}

func FuzzICR(f *testing.F) {
	fuzzKind(f, "ibm-icr", http.Header{}, `{"action":"container-registry.image.push","outcome":"success","target":{"name":"de.icr.io/a/b:1"}}`, `[{},7]`,
		`{"action":"container-registry.image.push","outcome":"success","eventTime":"9999-12-31T23:59:59-0100","target":{"name":"de.icr.io/a/b:1"}}`)
}

func FuzzMirantis(f *testing.F) {
	fuzzKind(f, "mirantis-dtr", http.Header{}, `{"type":"TAG_PUSH","contents":{"namespace":"a","repository":"b","tag":"1"}}`)
}
