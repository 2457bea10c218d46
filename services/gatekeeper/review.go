package gatekeeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// What is read and written of AdmissionReview
// (Kubernetes, API reference, admission.k8s.io/v1).
const (
	reviewVersion = "admission.k8s.io/v1"
	reviewKind    = "AdmissionReview"
)

// errReview is returned for a body that is no AdmissionReview to answer.
var errReview = errors.New("not an AdmissionReview of " + reviewVersion)

type review struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Request    *request  `json:"request,omitempty"`
	Response   *response `json:"response,omitempty"`
}

type request struct {
	UID  string `json:"uid"`
	Kind struct {
		Group string `json:"group"`
		Kind  string `json:"kind"`
	} `json:"kind"`
	SubResource string `json:"subResource"`
	Name        string `json:"name"`
	Namespace   string `json:"namespace"`
	Operation   string `json:"operation"`
	UserInfo    struct {
		Username string `json:"username"`
	} `json:"userInfo"`
	Object    json.RawMessage `json:"object"`
	OldObject json.RawMessage `json:"oldObject"`
	DryRun    bool            `json:"dryRun"`
}

type response struct {
	UID              string            `json:"uid"`
	Allowed          bool              `json:"allowed"`
	Status           *status           `json:"status,omitempty"`
	Warnings         []string          `json:"warnings,omitempty"`
	AuditAnnotations map[string]string `json:"auditAnnotations,omitempty"`
}

type status struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func readReview(body []byte) (*request, error) {
	var r review
	if err := json.Unmarshal(body, &r); err != nil {
		return nil, fmt.Errorf("%w: %w", errReview, err)
	}
	if r.APIVersion != reviewVersion || r.Kind != reviewKind {
		return nil, fmt.Errorf("%q of %q: %w", r.Kind, r.APIVersion, errReview)
	}
	if r.Request == nil || r.Request.UID == "" {
		return nil, fmt.Errorf("no request: %w", errReview)
	}
	return r.Request, nil
}

// podSpec is what names images in a Pod (core/v1 PodSpec).
type podSpec struct {
	InitContainers      []container `json:"initContainers"`
	Containers          []container `json:"containers"`
	EphemeralContainers []container `json:"ephemeralContainers"`
	Volumes             []struct {
		Name  string `json:"name"`
		Image *struct {
			Reference string `json:"reference"`
		} `json:"image"`
	} `json:"volumes"`
}

type container struct {
	Name  string `json:"name"`
	Image string `json:"image"`
}

type podTemplate struct {
	Spec podSpec `json:"spec"`
}

// workload holds the pod templates of all kinds, each at its place.
type workload struct {
	Metadata struct {
		Name         string `json:"name"`
		GenerateName string `json:"generateName"`
	} `json:"metadata"`
	Template podTemplate `json:"template"` // PodTemplate
	Spec     struct {
		podSpec                 // Pod
		Template    podTemplate `json:"template"` // most
		JobTemplate struct {    // CronJob
			Spec podTemplateOfJob `json:"spec"`
		} `json:"jobTemplate"`
	} `json:"spec"`
}

type podTemplateOfJob struct {
	Template podTemplate `json:"template"`
}

// pod returns the Pod that a workload of the given kind runs; ok is false for
// kinds that run none that we know of.
func (w *workload) pod(group, kind string) (spec *podSpec, ok bool) {
	switch group + "/" + kind {
	case "/Pod":
		return &w.Spec.podSpec, true
	case "/PodTemplate":
		return &w.Template.Spec, true
	case "/ReplicationController", "apps/Deployment", "apps/StatefulSet", "apps/DaemonSet", "apps/ReplicaSet", "batch/Job":
		return &w.Spec.Template.Spec, true
	case "batch/CronJob":
		return &w.Spec.JobTemplate.Spec.Template.Spec, true
	}
	return nil, false
}

// named is an image reference and where a workload writes it.
type named struct {
	reference string
	places    []string
}

// images returns the image references of a Pod, each once, in the order of the
// spec. Places without a reference are passed over: in a template somebody else
// fills them in, and the Pod that comes of it is looked at too.
func (s *podSpec) images() []named {
	var out []named
	add := func(reference, place string) {
		if reference == "" {
			return
		}
		i := slices.IndexFunc(out, func(n named) bool { return n.reference == reference })
		if i < 0 {
			out = append(out, named{reference: reference})
			i = len(out) - 1
		}
		out[i].places = append(out[i].places, place)
	}
	for _, c := range s.InitContainers {
		add(c.Image, "init container "+c.Name)
	}
	for _, c := range s.Containers {
		add(c.Image, "container "+c.Name)
	}
	for _, c := range s.EphemeralContainers {
		add(c.Image, "ephemeral container "+c.Name)
	}
	for _, v := range s.Volumes {
		if v.Image != nil {
			add(v.Image.Reference, "image volume "+v.Name)
		}
	}
	return out
}

// asked returns the images that a request brings into the cluster. An update
// brings those that the object did not name before: what runs already must stay
// changeable (labels, scale, finalizers) when its statement is no longer good.
// workloadName is as far as it is known.
func asked(r *request) (images []named, workloadName string, err error) {
	if r.Operation != "CREATE" && r.Operation != "UPDATE" {
		return nil, r.Name, nil
	}
	var now, before workload
	spec, ok := now.pod(r.Kind.Group, r.Kind.Kind)
	if !ok {
		return nil, r.Name, nil
	}
	if err := decodeObject(r.Object, &now); err != nil {
		return nil, r.Name, fmt.Errorf("object: %w", err)
	}
	workloadName = r.Name
	if workloadName == "" {
		workloadName = now.Metadata.Name
	}
	if workloadName == "" && now.Metadata.GenerateName != "" {
		workloadName = now.Metadata.GenerateName + "*"
	}
	images = spec.images()
	if r.Operation == "CREATE" {
		return images, workloadName, nil
	}
	if err := decodeObject(r.OldObject, &before); err != nil {
		return nil, workloadName, fmt.Errorf("oldObject: %w", err)
	}
	old, _ := before.pod(r.Kind.Group, r.Kind.Kind)
	known := old.images()
	images = slices.DeleteFunc(images, func(n named) bool {
		return slices.ContainsFunc(known, func(k named) bool { return k.reference == n.reference })
	})
	return images, workloadName, nil
}

// decodeObject refuses null too, which would pass for an object without images.
func decodeObject(content json.RawMessage, into *workload) error {
	if len(content) == 0 || content[0] != '{' {
		return fmt.Errorf("no object: %w", errReview)
	}
	if err := json.Unmarshal(content, into); err != nil {
		return fmt.Errorf("%w: %w", errReview, err)
	}
	return nil
}
