//! The commands for the daemon's log and for its start: those of systemd, or in a Pod those of kubectl.

use serde::{Deserialize, Serialize};

use super::Facts;
use crate::config::flags::Environment;

/// Where the kubelet puts the name of a Pod's namespace, beside the token that the Pod asks the API server with.
pub(super) const NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
/// That of our manifest.
const USUAL_NAMESPACE: &str = "kube-system";

/// The Pod of the DaemonSet that this is called in, and its daemon runs in.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name, where that is told: our manifest does not, flannel's does. The host's name is not its, since it is on the
    /// host's network.
    pub name: Option<String>,
    /// The node's name.
    pub node: String,
}

impl Pod {
    /// That of a process with this environment; `None` outside. `namespace` is what the kubelet's file holds. What is not made
    /// of a name's letters is not taken, since it comes to stand in a command.
    pub fn of(environment: &Environment, namespace: Option<&str>) -> Option<Self> {
        let variable = |name: &str| {
            let mut all = environment.variables.iter();
            all.find_map(|(key, value)| (key == name).then(|| value.to_str())?)
        };
        variable("KUBERNETES_SERVICE_HOST")?;
        let hostname = environment.hostname.as_ref().and_then(|name| name.to_str());
        let namespace = named(variable("POD_NAMESPACE")).or_else(|| named(namespace));
        let node = named(variable("NODE_NAME")).or_else(|| named(hostname));
        Some(Self {
            namespace: namespace.unwrap_or_else(|| USUAL_NAMESPACE.to_owned()),
            name: named(variable("POD_NAME")),
            node: node.unwrap_or_else(|| "NODE".to_owned()),
        })
    }

    /// What picks it, where its name is not told: the label is that of our manifest and of flannel's.
    fn selector(&self) -> String {
        format!("-l app=flannel --field-selector spec.nodeName={}", self.node)
    }

    /// Shows its log, with these flags.
    pub(super) fn log(&self, flags: &str) -> String {
        let namespace = &self.namespace;
        let pod = match &self.name {
            Some(name) => name.clone(),
            None => format!("$(kubectl -n {namespace} get pods {} -o name)", self.selector()),
        };
        format!("kubectl -n {namespace} logs {pod} {flags}")
    }

    /// Ends it: the DaemonSet makes another at once.
    fn delete(&self) -> String {
        let pod = self.name.clone().unwrap_or_else(|| self.selector());
        format!("kubectl -n {} delete pod {pod}", self.namespace)
    }
}

/// A name as Kubernetes takes it, and no more.
fn named(text: Option<&str>) -> Option<String> {
    let text = text?.trim();
    let letters = text
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-');
    (letters && !text.is_empty() && !text.starts_with('-')).then(|| text.to_owned())
}

impl Facts {
    /// Shows the end of the daemon's log.
    pub(super) fn log(&self) -> String {
        match &self.pod {
            Some(pod) => pod.log("--tail=50"),
            None => "journalctl -u ringmail -n 50".to_owned(),
        }
    }

    /// Starts a daemon where none runs, and shows what it says. Of a Pod that is deleted the log is gone.
    pub(super) fn start(&self) -> String {
        match &self.pod {
            Some(pod) => format!("{}; {}", self.log(), pod.delete()),
            None => format!("systemctl start ringmail; {}", self.log()),
        }
    }

    /// Starts the daemon anew.
    pub(super) fn restart(&self) -> String {
        match &self.pod {
            Some(pod) => pod.delete(),
            None => "systemctl restart ringmail".to_owned(),
        }
    }

    /// Takes away what the daemon left on this node, and starts it anew; `None` outside a Pod, where the daemon's own errors
    /// say how.
    pub(super) fn clear(&self) -> Option<String> {
        let pod = self.pod.as_ref()?;
        Some(format!(
            "kubectl -n {} delete daemonset kube-flannel-ds --cascade=orphan; {}; sed 's|kubernetes.io/os: \
             linux}}|kubernetes.io/hostname: {}}}|' deploy/cleanup.yml | kubectl apply -f -; once that is done, kubectl delete \
             -f deploy/cleanup.yml; kubectl apply -f deploy/ringmail.yml",
            pod.namespace,
            pod.delete(),
            pod.node
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)], hostname: Option<&str>) -> Environment {
        let variables = variables.iter().map(|(key, value)| (key.into(), value.into()));
        Environment {
            variables: variables.collect(),
            hostname: hostname.map(Into::into),
        }
    }

    const WITHIN: (&str, &str) = ("KUBERNETES_SERVICE_HOST", "10.96.0.1");

    #[test]
    fn outside_a_pod_there_is_none_whatever_else_is_set() {
        let outside = environment(&[("NODE_NAME", "node-a"), ("POD_NAME", "ds-x")], Some("node-a"));
        assert_eq!(Pod::of(&outside, Some("kube-system")), None);
    }

    #[test]
    fn a_pod_of_our_manifest_is_picked_by_its_node_and_one_of_flannels_by_its_name() {
        // Ours gives NODE_NAME; on the host's network HOSTNAME is the node's too.
        let ours = environment(
            &[WITHIN, ("NODE_NAME", "node-a"), ("HOSTNAME", "host-a")],
            Some("host-a"),
        );
        let ours = Pod::of(&ours, Some("net\n")).expect("it is one");
        assert_eq!(
            ours.delete(),
            "kubectl -n net delete pod -l app=flannel --field-selector spec.nodeName=node-a"
        );
        assert_eq!(
            ours.log("--tail=50"),
            "kubectl -n net logs $(kubectl -n net get pods -l app=flannel --field-selector spec.nodeName=node-a -o name) \
             --tail=50"
        );
        let theirs = [WITHIN, ("POD_NAME", "ds-x"), ("POD_NAMESPACE", "kube-flannel")];
        let theirs = Pod::of(&environment(&theirs, None), Some("net")).expect("it is one");
        assert_eq!(theirs.delete(), "kubectl -n kube-flannel delete pod ds-x");
        assert_eq!(theirs.log("--tail=50"), "kubectl -n kube-flannel logs ds-x --tail=50");
    }

    #[test]
    fn what_is_not_told_or_no_name_is_the_usual_one() {
        let usual = Pod {
            namespace: "kube-system".into(),
            name: None,
            node: "node-a".into(),
        };
        for odd in ["", "a b", "x;reboot", "$(reboot)", "-x"] {
            let all = [WITHIN, ("NODE_NAME", odd), ("POD_NAME", odd), ("POD_NAMESPACE", odd)];
            let found = Pod::of(&environment(&all, Some("node-a")), Some(odd));
            assert_eq!(found.as_ref(), Some(&usual), "{odd:?}");
        }
        let bare = Pod::of(&environment(&[WITHIN], None), None).expect("it is one");
        assert_eq!(bare.node, "NODE");
    }
}
