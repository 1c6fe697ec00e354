package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/release"
)

func contrib(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("../../contrib", name))
	require.NoError(t, err)
	return string(data)
}

// readsAsOptions reads the arguments of an example as the daemon does, with its
// files in a folder of the test's.
func readsAsOptions(t *testing.T, args []string, folders ...string) options {
	t.Helper()
	dir := t.TempDir()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	for name, content := range map[string]string{
		"api.key": longKey, "seal.key": "x", "dsn": "postgres://nanomdm:p@database/nanomdm",
		"ca.pem": string(ca.PEM()), "device-ca.pem": string(ca.PEM()),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	var moved []string
	for _, arg := range args {
		for _, folder := range folders {
			arg = strings.ReplaceAll(arg, folder, dir)
		}
		moved = append(moved, arg)
	}
	o, warnings, err := parseOptions(moved, nil, os.Stat)
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.NotZero(t, o.drainDelay, "load balancers need time to notice a stop")
	require.NotEmpty(t, o.sealKeyFile)
	return o
}

func TestSystemdUnit(t *testing.T) {
	unit := contrib(t, "systemd/nanomdm.service")
	command := regexp.MustCompile(`(?s)ExecStart=(\S+) (.*?[^\\])\n`).FindStringSubmatch(unit)
	require.NotNil(t, command)
	args := strings.Fields(strings.ReplaceAll(command[2], "\\\n", " "))
	readsAsOptions(t, args, "%d")
	for _, arg := range args {
		if name, ok := strings.CutPrefix(arg, "%d/"); ok {
			require.Contains(t, unit, "LoadCredential="+name+":")
		}
	}

	analyze := installed(t, "systemd-analyze")
	self, err := os.Executable()
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "nanomdm.service")
	require.NoError(t, os.WriteFile(file, []byte(strings.Replace(unit, command[1], self, 1)), 0o600))
	out, err := exec.Command(analyze, "verify", file).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Empty(t, string(out))
}

func TestComposeFile(t *testing.T) {
	type service struct {
		Image    string
		Command  []string
		Secrets  []string
		ReadOnly bool `yaml:"read_only"`
		Networks map[string]struct {
			Address string `yaml:"ipv4_address"`
		}
		DependsOn yaml.Node `yaml:"depends_on"`
	}
	var file struct {
		Services map[string]service
		Secrets  map[string]struct{ File string }
	}
	require.NoError(t, yaml.Unmarshal([]byte(contrib(t, "docker/compose.yaml")), &file))
	nginx := contrib(t, "docker/nginx.conf")
	replicas := 0
	for name, s := range file.Services {
		for _, secret := range s.Secrets {
			require.Contains(t, file.Secrets, secret, name)
		}
		if !strings.HasPrefix(name, "replica-") {
			continue
		}
		replicas++
		o := readsAsOptions(t, s.Command, "/run/secrets")
		require.Equal(t, "nanomdm:"+release.Version(), s.Image)
		require.True(t, s.ReadOnly)
		require.Contains(t, nginx, "server "+s.Networks["default"].Address+":9000 ")
		require.Len(t, o.trustedProxies, 1)
		require.Contains(t, nginx, "proxy_set_header "+o.certHeader+" ")
	}
	require.Equal(t, 2, replicas)

	// nginx reads its part.
	program := installed(t, "nginx")
	dir := t.TempDir()
	devices, err := mdmtest.NewCA()
	require.NoError(t, err)
	writeTLS(t, dir, devices)
	conf := strings.NewReplacer("/run/secrets", dir, "listen 443", "listen 127.0.0.1:"+portOf(freePort(t))).Replace(nginx)
	temp := ""
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		temp += kind + "_temp_path " + dir + "/" + kind + ";\n"
	}
	file2 := filepath.Join(dir, "test.conf")
	require.NoError(t, os.WriteFile(file2, []byte("pid "+dir+"/pid;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n"+temp+conf+"\n}\n"), 0o600))
	out, err := exec.Command(program, "-t", "-p", dir, "-c", file2).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, string(out), "[warn]")
}

func portOf(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }

func TestKubernetesManifests(t *testing.T) {
	type object struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string
		Metadata   struct{ Name, Namespace string }
		Spec       struct {
			Selector yaml.Node
			Template struct {
				Metadata struct{ Labels map[string]string }
				Spec     struct {
					Containers []struct {
						Image          string
						Args           []string
						Ports          []struct{ Name string }
						LivenessProbe  probe                   `yaml:"livenessProbe"`
						ReadinessProbe probe                   `yaml:"readinessProbe"`
						VolumeMounts   []struct{ Name string } `yaml:"volumeMounts"`
					}
					Volumes []struct{ Name string }
				}
			}
			Ports []struct {
				TargetPort string `yaml:"targetPort"`
			}
		}
	}
	kinds := make(map[string]int)
	decoder := yaml.NewDecoder(bytes.NewReader([]byte(contrib(t, "kubernetes/nanomdm.yaml"))))
	for {
		var o object
		err := decoder.Decode(&o)
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		require.NotEmpty(t, o.APIVersion, o.Kind)
		require.NotEmpty(t, o.Metadata.Name, o.Kind)
		require.Equal(t, "nanomdm", o.Metadata.Namespace, o.Kind)
		kinds[o.Kind]++
		for _, port := range o.Spec.Ports {
			require.Contains(t, []string{"devices", "api"}, port.TargetPort)
		}
		if o.Kind != "Deployment" {
			continue
		}
		require.Equal(t, map[string]string{"app": "nanomdm"}, o.Spec.Template.Metadata.Labels)
		require.Len(t, o.Spec.Template.Spec.Containers, 1)
		c := o.Spec.Template.Spec.Containers[0]
		require.Equal(t, "nanomdm:"+release.Version(), c.Image)
		require.Equal(t, probe{httpGet{"/healthz", "devices"}}, c.LivenessProbe)
		require.Equal(t, probe{httpGet{"/readyz", "devices"}}, c.ReadinessProbe)
		require.Len(t, c.VolumeMounts, len(o.Spec.Template.Spec.Volumes))
		readsAsOptions(t, c.Args, "/etc/nanomdm/secrets", "/etc/nanomdm/ca")
	}
	require.Equal(t, map[string]int{"Deployment": 1, "PodDisruptionBudget": 1, "Service": 2, "NetworkPolicy": 1}, kinds)
}

type probe struct {
	HTTPGet httpGet `yaml:"httpGet"`
}

type httpGet struct{ Path, Port string }
