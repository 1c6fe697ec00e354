package service_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
)

// A middleware that refuses devices by serial number. It goes into the chain of
// cmd/nanomdm, in front of package certauth.
func ExampleMiddleware() {
	errUnknown := errors.New("the serial number is not in the inventory")
	known := func(serial string) bool { return serial == "C02XL0GYJGH5" }

	var refuse service.Middleware = func(next service.Handler) service.Handler {
		return service.HandlerFunc(func(ctx context.Context, r *service.Request) (*service.Response, error) {
			if m, ok := r.Message.(*mdm.Authenticate); ok && !known(m.SerialNumber) {
				// Never 401: it makes a device unenroll.
				return nil, &service.StatusError{Status: http.StatusForbidden, Err: errUnknown}
			}
			return next.Handle(ctx, r)
		})
	}

	protocol := service.HandlerFunc(func(context.Context, *service.Request) (*service.Response, error) {
		return &service.Response{}, nil
	})
	chain := service.Chain(protocol, refuse)
	for _, serial := range []string{"C02XL0GYJGH5", "F4KFPH8XQ1MN"} {
		_, err := chain.Handle(context.Background(), &service.Request{Message: &mdm.Authenticate{SerialNumber: serial}})
		fmt.Println(serial, err)
	}
	// Output:
	// C02XL0GYJGH5 <nil>
	// F4KFPH8XQ1MN answered 403: the serial number is not in the inventory
}
