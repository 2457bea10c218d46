package e2e

import (
	"fmt"
	"testing"

	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// story returns the demo's images; a small generated program stands for its executable.
func story(t *testing.T) sample.Story {
	t.Helper()
	s, err := sample.NewStory(sample.GoBinary("go1.20.1", "example.com/tool", sample.GoModule{Path: "golang.org/x/net", Version: "v0.7.0"}))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// fleet returns n images that share three layers and have one of their own.
func fleet(t testing.TB, n, sharedBytes, ownBytes int) []sample.Image {
	t.Helper()
	layer := func(instruction string, files ...sample.File) sample.Layer {
		l, err := sample.NewLayer(instruction, files...)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	shared := []sample.Layer{
		layer("ADD base", append(sample.Debian(12), sample.File{Path: "usr/lib/base.bin", Body: sample.Noise(1, sharedBytes/3)})...),
		layer("RUN npm ci", sample.NPM("srv", "lodash", "4.17.4"), sample.NPM("srv", "minimist", "0.0.8"), sample.File{Path: "srv/data.bin", Body: sample.Noise(2, sharedBytes/3)}),
		layer("RUN pip install", append(sample.Wheel("Django", "2.2"), sample.File{Path: "srv/more.bin", Body: sample.Noise(3, sharedBytes/3)})...),
	}
	var out []sample.Image
	for i := range n {
		own := layer("COPY app", sample.NPM("app", fmt.Sprintf("own-%d", i), "1.0.0"), sample.File{Path: "app/own.bin", Body: sample.Noise(uint64(1000+i), ownBytes)})
		out = append(out, sample.Image{Platform: sample.AMD64, Layers: append(append([]sample.Layer{}, shared...), own)})
	}
	return out
}
