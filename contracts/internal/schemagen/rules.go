package main

import (
	"reflect"
	"slices"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const (
	digestPattern = "^sha256:[0-9a-f]{64}$"
	tagPattern    = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
	hexPattern    = "^[0-9a-f]+$"
)

// digests are the fields whose text is always a digest, by JSON name.
var digests = []string{"digest", "diffId", "diffID", "inventory", "report", "snapshot", "policy", "sbom", "bundle"}

// loose are fields that look like digests or tags and may be something else,
// because they tell what somebody else said.
var loose = []string{"WebhookEvent.Digest", "WebhookEvent.Tag"}

// closed are the sets of values that will not grow without a new version.
func closed(field string) []string {
	severities := []string{
		contracts.SeverityCritical, contracts.SeverityHigh, contracts.SeverityMedium, contracts.SeverityLow, contracts.SeverityUnknown,
	}
	switch field {
	case "Finding.Severity", "SummaryItem.Severity", "Problem.Severity":
		return severities
	case "Finding.Status":
		return []string{
			contracts.StatusAffected, contracts.StatusNotAffected, contracts.StatusFixed, contracts.StatusUnderInvestigation,
		}
	case "ImagePlanned.Kind", "ImageAssembled.Kind", "ImageRematch.Kind", "ImageMatched.Kind", "ImageAttested.Kind",
		"Inventory.Kind", "Report.Kind", "ImageEntry.Kind":
		return []string{contracts.KindImage, contracts.KindIndex}
	case "ImageMatched.Verdict", "ImageAttested.Verdict", "Report.Verdict", "VulnSummary.Verdict", "VSATidewaiter.Verdict",
		"Scan.Verdict", "VerifiedStatement.Verdict", "ImageEntry.Verdict":
		return []string{contracts.VerdictPass, contracts.VerdictWarn, contracts.VerdictFail}
	case "AdmissionDecided.Decision", "AdmissionImage.Decision":
		return []string{contracts.DecisionAdmit, contracts.DecisionWarn, contracts.DecisionDeny}
	case "AdmissionDecided.Mode":
		return []string{"enforce", "warn", "audit"}
	case "Problem.State":
		return []string{"open", "closed"}
	case "Problem.Group":
		return []string{"fixable", "unfixed"}
	case "PackageDatabase.Kind":
		return []string{"dpkg", "apk", "rpm"}
	case "VSAPredicate.VerificationResult":
		return []string{"PASSED", "FAILED"}
	case "Sweep.State":
		return []string{contracts.SweepRunning, contracts.SweepComplete, contracts.SweepIncomplete, contracts.SweepFailed}
	case "ConfigProblem.Severity":
		return []string{contracts.ConfigError, contracts.ConfigWarning}
	case "WebhookEvent.Action":
		return []string{"push", "delete", "ignore"}
	}
	return nil
}

// ruleOf returns what the schema says of a field beyond its type.
func ruleOf(owner, field, name string, t reflect.Type) map[string]any {
	rules := map[string]any{}
	id := owner + "." + field
	if values := closed(id); values != nil {
		rules["enum"] = values
	}
	pointer := t.Kind() == reflect.Pointer
	if pointer {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.String:
		switch {
		case slices.Contains(loose, id):
		case id == "Gap.Layer" || slices.Contains(digests, name):
			rules["pattern"] = digestPattern
		case name == "tag":
			rules["pattern"] = tagPattern
		case id == "Problem.Key" || id == "ImageAttested.Signer":
			rules["pattern"] = hexPattern
		case (name == "registry" || name == "repository") && !pointer:
			rules["minLength"] = 1
		}
	case reflect.Int, reflect.Int64:
		if !pointer { // optional figures may be differences
			rules["minimum"] = 0
		}
	case reflect.Float64:
		if name == "shareVulnerable" || name == "shareOutdated" {
			rules["minimum"], rules["maximum"] = 0, 1
		}
		if id == "Finding.Score" {
			rules["minimum"], rules["maximum"] = 0, 10
		}
	}
	return rules
}

// descriptions are for fields whose name says enough in Go: by "Type.name",
// else by JSON name.
var descriptions = map[string]string{
	"actor":                          "who did it, as the sender says; a name, never a credential",
	"aliases":                        "other ids of the same vulnerability",
	"ageHours":                       "hours since newest",
	"analyzer":                       "version of the analyzer",
	"arch":                           "architecture, as the package manager writes it",
	"attempt":                        "0 at first; raised each time the layer is asked for again",
	"codename":                       "VERSION_CODENAME",
	"counts":                         "findings by severity",
	"cycle":                          "release cycle that the version belongs to, as endoflife.date writes it",
	"deliveryId":                     "the sender's id of the delivery, or a hash of it",
	"details":                        "more about this step; its fields differ from step to step and may grow",
	"diffId":                         "digest of the uncompressed tar",
	"diffID":                         "digest of the uncompressed tar",
	"digest":                         "digest of the manifest or index",
	"ecosystem":                      "OSV's name of the ecosystem, with the release where there is one",
	"ecosystems":                     "number of advisories by ecosystem",
	"entries":                        "number of entries in the tar",
	"epss":                           "number of vulnerabilities with an EPSS score",
	"file":                           "name of the input",
	"fixed":                          "the version that mends it",
	"gaps":                           "number of places that were not looked at",
	"image":                          "the image, as registry, repository and digest",
	"instruction":                    "the instruction of the build file that made the layer, as the image's history tells",
	"inventory":                      "digest of the inventory",
	"kev":                            "whether it is known to be exploited (CISA's catalog)",
	"kind":                           `"image" for one manifest with layers, "index" for an index of manifests`,
	"layer":                          "the layer that brought it; absent where it is not known",
	"malware":                        "whether the package itself is malicious",
	"matcher":                        "version of the matcher",
	"mediaType":                      "media type of the manifest",
	"message":                        "a sentence for people",
	"module":                         "rpm modularity label",
	"name":                           "name, as its ecosystem writes it",
	"occurredAt":                     "when it happened, by the sender's clock",
	"ok":                             "whether the step went well; absent where that is no question",
	"packages":                       "number of packages",
	"parameters":                     "parameters of the scan; null when there are none",
	"paths":                          `files that prove the package, nested archives joined with "!/"`,
	"platform":                       "platform of the image; absent for an index",
	"policy":                         "digest of the policy that the verdict follows",
	"predicateType":                  "in-toto predicate type",
	"product":                        "product, as endoflife.date names it",
	"products":                       "number of products with end-of-life data",
	"purl":                           "package URL",
	"reason":                         "why, in words",
	"reasons":                        `why the verdict is not "pass"`,
	"receivedAt":                     "when it arrived, by our clock",
	"records":                        "number of advisories that can match",
	"registry":                       "host[:port] of the registry, as configured",
	"report":                         "digest of the report",
	"repository":                     "path below the registry",
	"sbom":                           "digest of the CycloneDX document attached to the image",
	"sequence":                       "number of the snapshot; a later one is higher",
	"server":                         "whether it is server software outside any package manager",
	"service":                        "the service",
	"severity":                       "severity, the worst where there are several",
	"size":                           "bytes, compressed",
	"snapshot":                       "digest of the advisory snapshot",
	"snapshotTime":                   "newest modification among the snapshot's advisories",
	"source":                         "id of the configured source it came through, or the service that asked",
	"sourceVersion":                  "version of the source package",
	"status":                         "OpenVEX status",
	"subject":                        "what it is about",
	"summary":                        "one sentence from the advisory",
	"tag":                            "tag; absent where there is none or none is known",
	"time":                           "when",
	"validUntil":                     "when the statement ends to count",
	"verdict":                        "verdict of the policy",
	"version":                        "version",
	"versions":                       "versions that are affected",
	"AdmissionDecided.imageCount":    "number of images; images may list fewer",
	"AdmissionDecided.decidedAt":     "when it was answered",
	"AdmissionDecided.namespace":     "the workload's namespace",
	"AdvisoriesBuild.kev":            "number of vulnerabilities known to be exploited",
	"AdvisoriesStatus.kev":           "number of vulnerabilities known to be exploited",
	"AdvisoriesStatus.bytes":         "size of the snapshot's file",
	"Blob.digest":                    "digest of the content",
	"Counts.critical":                "findings of severity critical",
	"Counts.high":                    "findings of severity high",
	"Counts.medium":                  "findings of severity medium",
	"Counts.low":                     "findings of severity low",
	"Counts.unknown":                 "findings without a known severity",
	"DeadLetterContent.letter":       "what dlq list says of it",
	"ImageEntry.sequence":            "sequence of the snapshot that the verdict rests on",
	"DeadLetter.attempts":            "how often it was tried",
	"DeadLetter.eventType":           "CloudEvents type; absent where the bytes are no event",
	"DeadLetter.offset":              "offset of the dead letter",
	"DeadLetter.partition":           "partition of the dead letter",
	"DeadLetter.reason":              "why it was given up",
	"DeadLetter.replayed":            "whether it was sent again since",
	"DeadLetter.service":             "the service that gave it up",
	"DeadLetter.subject":             "CloudEvents subject",
	"DeadLetter.time":                "when it was given up",
	"DeadLetter.topic":               "topic of the dead letter",
	"Delivery.subjects":              "what was published, registry/repository[:tag][@digest], the first few",
	"Delivery.trouble":               "what was wrong with it, in words; never what was presented as a proof",
	"FindingPackage.version":         "the version found",
	"FleetReport.openProblems":       "problems that are open",
	"Gap.path":                       "where in the layer; absent: all of it",
	"ImageGone.reason":               "how it was found to be gone",
	"ImageAttested.signedAt":         "when the statements were signed",
	"InventoryPart.digest":           "digest of the part's manifest",
	"ReportPart.digest":              "digest of the part's manifest",
	"PlannedPart.digest":             "digest of the part's manifest",
	"PlannedPart.mediaType":          "media type of the part",
	"PlannedPart.size":               "bytes of the part's manifest",
	"LayerAnalyzed.digest":           "digest of the layer",
	"LayerFailed.digest":             "digest of the layer",
	"LayerReport.digest":             "digest of the layer",
	"LayerRequested.digest":          "digest of the layer",
	"LayerRef.digest":                "digest of the layer",
	"PlannedLayer.digest":            "digest of the layer",
	"LayerFailed.image":              "the image through whose repository it was tried",
	"LayerRequested.mediaType":       "media type of the layer",
	"PlannedLayer.mediaType":         "media type of the layer",
	"Lag.outdated":                   "whether a newer version exists, in its own cycle or another",
	"Lag.version":                    "the version found",
	"OSRelease.id":                   "ID",
	"OSRelease.idLike":               "ID_LIKE",
	"OSRelease.versionId":            "VERSION_ID",
	"OSRelease.prettyName":           "PRETTY_NAME",
	"OSRelease.path":                 "the file that was read",
	"PackageDatabase.path":           "the database's file",
	"Platform.os":                    `operating system, for example "linux"`,
	"Platform.architecture":          `architecture, for example "amd64"`,
	"Platform.variant":               `variant of the architecture, for example "v8"`,
	"Problem.changedAt":              "when this revision was made",
	"Problem.openedAt":               "when the problem was opened",
	"Problem.imageCount":             "number of images; images may list fewer",
	"Report.packages":                "number of packages looked at",
	"ServerLag.eol":                  "images with a version past its end of life",
	"ServerLag.images":               "images that hold the product",
	"ServerLag.latest":               "newest version of all cycles",
	"ServerLag.oldest":               "oldest version in use",
	"ServerLag.outdated":             "images with a version behind the newest",
	"ServerLag.versions":             "versions in use",
	"ServerLag.worstDays":            "days that the oldest runs behind; absent: unknown",
	"SnapshotRef.digest":             "digest of the snapshot",
	"SourceStatus.kind":              "kind of the source",
	"StatementRef.predicateType":     "in-toto predicate type, or the artifact type of a plain referrer",
	"SummaryItem.id":                 "CVE where there is one, else the advisory's own id",
	"SystemPackage.source":           "source package",
	"TagObserved.observedAt":         "when planner looked",
	"TimelineEntry.step":             `"pushed", "planned", "analyzed", "deduplicated", "assembled", "matched", "attested", "verified", "unsupported", "deleted", "failed" or "done"; the list may grow`,
	"VSAPredicate.inputAttestations": "the statements that the verdict rests on",
	"VSAPredicate.resourceUri":       "registry/repository@digest",
	"VSAPredicate.slsaVersion":       "version of the SLSA specification",
	"VSAPredicate.timeVerified":      "when the policy was evaluated",
	"VSAPredicate.verifiedLevels":    "levels that were verified",
	"VSAResource.uri":                "where it is",
	"VSAVerifier.id":                 "URI of the verifier",
	"VSAVerifier.version":            "versions of the verifier's parts, by name",
	"VerdictCounts.pass":             "images that pass",
	"VerdictCounts.warn":             "images that pass with a warning",
	"VerdictCounts.fail":             "images that fail",
	"Verification.digest":            "digest of what was verified",
	"Verification.verified":          "whether there is a good statement",
	"VerifiedStatement.signer":       "who signed: sha256 of the public key (DER), hex",
	"VerifiedStatement.time":         "when it was signed",
	"VerifiedStatement.sequence":     "sequence of the snapshot it rests on",
	"VulnDB.uri":                     "digest of the advisory snapshot, as URI",
	"VulnDB.version":                 "sequence of the advisory snapshot",
	"VulnInvocation.builder.id":      "who ran the scan",
	"VulnInvocation.event_id":        "id of the event that asked for it",
	"VulnInvocation.uri":             "where it ran",
	"VulnMetadata.scanStartedOn":     "when the match began",
	"VulnMetadata.scanFinishedOn":    "when the match ended",
	"VulnScanner.uri":                "URI of the scanner",
	"VulnScanner.version":            "versions of analyzer and matcher",
	"WebhookEvent.digest":            "digest; null where the payload says none, or one of a push or delete that cannot be right",
	"WebhookEvent.reason":            "why this action, in words",
	"WebhookEvent.registry":          "host[:port]; null where neither payload nor configuration says it",
	"WebhookEvent.repository":        "path below the registry; null where the payload does not say it",
	"WebhookEvent.tag":               "tag; null where there is none",
}
