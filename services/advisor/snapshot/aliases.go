package snapshot

// Aliases joins names of one vulnerability, a union-find.
type Aliases map[string]string

// Find returns the name that stands for all that were joined with name: the
// least of them, whatever the order in which they were joined.
func (a Aliases) Find(name string) string {
	for {
		up, ok := a[name]
		if !ok {
			return name
		}
		name = up
	}
}

// Join says that two names mean the same.
func (a Aliases) Join(x, y string) {
	x, y = a.Find(x), a.Find(y)
	if x == y {
		return
	}
	if y < x {
		x, y = y, x
	}
	a[y] = x
}
