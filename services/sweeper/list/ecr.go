package list

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/ecr/types"
	"github.com/aws/smithy-go"

	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// ecrPage is the largest page that ECR gives.
const ecrPage = 1000

var ecrHost = regexp.MustCompile(`^([0-9]{12})\.dkr[.-]ecr`)

// ecrLister lists through Amazon ECR (API reference: DescribeRepositories,
// DescribeImages).
type ecrLister struct {
	o       Options
	api     *ecr.Client
	account *string // whose registry; nil: the credentials' own
	page    int32
}

func newECR(o Options) (Lister, error) {
	// AWS's own client, which heeds AWS_CA_BUNDLE too.
	transport := awshttp.NewBuildableClient().WithTimeout(requestTimeout)
	if o.CAFile != "" {
		trust, err := trusting(o.CAFile)
		if err != nil {
			return nil, err
		}
		transport = transport.WithTransportOptions(func(t *http.Transport) { t.TLSClientConfig = trust })
	}
	// Nothing is asked yet: the chain of credentials is read at the first request.
	cfg, err := config.LoadDefaultConfig(context.Background(), config.WithRegion(o.Region), config.WithHTTPClient(transport),
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} })) // how often it is tried is the caller's to say
	if err != nil {
		return nil, fmt.Errorf("read AWS's configuration: %w: %w", err, ErrConfig)
	}
	if o.Secret != nil {
		if o.Username == "" {
			return nil, fmt.Errorf("api ecr needs username, the access key id, beside the secret: %w", ErrConfig)
		}
		cfg.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			secret, err := o.Secret()
			return aws.Credentials{AccessKeyID: o.Username, SecretAccessKey: secret, Source: "sweep"}, err
		})
	}
	l := &ecrLister{o: o, page: ecrPage}
	l.api = ecr.NewFromConfig(cfg, func(e *ecr.Options) {
		if o.URL != "" {
			e.BaseEndpoint = aws.String(o.URL)
		}
	})
	if m := ecrHost.FindStringSubmatch(o.Registry); m != nil {
		l.account = &m[1]
	}
	return l, nil
}

func (l *ecrLister) Repositories(ctx context.Context, next string) ([]Repository, string, error) {
	if err := l.o.Wait(ctx); err != nil {
		return nil, "", err
	}
	answer, err := l.api.DescribeRepositories(ctx, &ecr.DescribeRepositoriesInput{
		RegistryId: l.account, MaxResults: aws.Int32(l.page), NextToken: token(next),
	})
	if err != nil {
		return nil, "", fromAWS(ctx, "list ECR's repositories", err)
	}
	page := make([]Repository, 0, len(answer.Repositories))
	for _, r := range answer.Repositories {
		if name := aws.ToString(r.RepositoryName); l.within(name) {
			page = append(page, Repository{Name: name})
		}
	}
	return named(page), aws.ToString(answer.NextToken), nil
}

// within says whether a repository is one of those that are to be listed.
func (l *ecrLister) within(name string) bool {
	return len(l.o.Within) == 0 || slices.ContainsFunc(l.o.Within, func(w string) bool {
		return name == w || strings.HasSuffix(w, "/") && strings.HasPrefix(name, w)
	})
}

func (l *ecrLister) Tags(ctx context.Context, r Repository, next string) ([]Tag, string, error) {
	if err := l.o.Wait(ctx); err != nil {
		return nil, "", err
	}
	answer, err := l.api.DescribeImages(ctx, &ecr.DescribeImagesInput{
		RegistryId: l.account, RepositoryName: aws.String(r.Name), MaxResults: aws.Int32(l.page), NextToken: token(next),
		Filter: &types.DescribeImagesFilter{TagStatus: types.TagStatusTagged},
	})
	if err != nil {
		return nil, "", fromAWS(ctx, "list ECR's images of "+r.Name, err)
	}
	var page []Tag
	for _, image := range answer.ImageDetails {
		for _, t := range image.ImageTags {
			page = append(page, Tag{Name: t, Digest: aws.ToString(image.ImageDigest), MediaType: aws.ToString(image.ImageManifestMediaType)})
		}
	}
	return tagged(page), aws.ToString(answer.NextToken), nil
}

func token(next string) *string {
	if next == "" {
		return nil
	}
	return &next
}

// throttling are the codes with which AWS asks to slow down; the status is 400.
var throttling = []string{"ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "LimitExceededException", "SlowDown"}

// fromAWS makes an error of package registry of one of the SDK, whose texts
// name the request and the caller's identity and are not kept.
func fromAWS(ctx context.Context, what string, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	e := &registry.Error{What: what, Kind: registry.ErrUnavailable}
	var response *awshttp.ResponseError
	if errors.As(err, &response) && response.Response != nil {
		e.Status = response.HTTPStatusCode()
		e.After = afterOf(response.Response.Header)
	}
	var api smithy.APIError
	if !errors.As(err, &api) {
		if e.Status == 0 {
			e.Detail = "no answer, or there are no credentials"
		}
		return e
	}
	code := api.ErrorCode()
	switch {
	case slices.Contains(throttling, code), e.Status == http.StatusTooManyRequests:
		e.Kind = registry.ErrThrottled
	case code == "RepositoryNotFoundException":
		e.Kind = registry.ErrNotFound
	case e.Status >= 500:
	case code == "AccessDeniedException", strings.Contains(code, "Token"), strings.Contains(code, "Signature"),
		strings.Contains(code, "Auth"), e.Status == http.StatusUnauthorized, e.Status == http.StatusForbidden:
		e.Kind, e.Detail = registry.ErrUnauthorized, "check the sweep's credentials: ecr:DescribeRepositories and ecr:DescribeImages are needed"
	default:
		e.Kind = registry.ErrRefused
	}
	return e
}

func afterOf(h http.Header) time.Duration {
	c := &client{now: time.Now}
	return c.after(h)
}
