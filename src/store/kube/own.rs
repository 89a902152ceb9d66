//! Which Node is this node's, and which subnets it has.

use kube::Api;
use kube::api::{ApiResource, NotUsed, Object};
use serde::Deserialize;
use tokio::time::sleep;

use super::connect::Connector;
use super::view::Record;
use super::{FIRST, SLOWEST, SPREAD};
use crate::lease::{Network, NodeName, Subnets};
use crate::store::StoreError;
use crate::store::health::{Half, Pulse};
use crate::store::jitter::jittered;

/// The podCIDRs of `record`, of the families of `network`.
pub(super) fn assigned(record: &Record, node: &NodeName, network: &Network) -> Result<Subnets, StoreError> {
    let doing = "use the Node's podCIDR";
    let node = node.as_str();
    let pods = record.pods.as_deref().unwrap_or_default();
    // The controller that gives podCIDRs may be late; the rest asks for a person.
    if pods.is_empty() {
        return Err(StoreError::Kube {
            doing,
            why: format!(
                "node {node:?} pod cidr not assigned: kube-controller-manager gives it with --allocate-node-cidrs and --cluster-cidr"
            ),
            transient: true,
        });
    }
    let both: Subnets = pods.iter().copied().collect();
    let subnets = Subnets {
        v4: both.v4.filter(|_| network.v4.is_some()),
        v6: both.v6.filter(|_| network.v6.is_some()),
    };
    let outside = subnets.iter().find(|net| network.net_of(*net).is_none());
    if let Some(net) = outside {
        let family = if net.addr().is_ipv4() { "" } else { "IPv6 " };
        let range = network
            .nets()
            .find(|range| range.addr().is_ipv4() == net.addr().is_ipv4());
        let range = range.map(|range| range.to_string()).unwrap_or_default();
        return Err(StoreError::Kube {
            doing,
            why: format!(
                "subnet {range:?} specified in the flannel net config doesn't contain {:?} {family}PodCIDR of the {node:?} node",
                net.to_string()
            ),
            transient: false,
        });
    }
    Ok(subnets)
}

/// What is read of a Pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    #[serde(default)]
    node_name: String,
}

/// The Node that a Pod runs on. A server that does not answer is waited for.
pub(super) async fn node_of_pod(
    connector: &Connector,
    pulse: &Pulse,
    namespace: &str,
    pod: &str,
) -> Result<NodeName, StoreError> {
    let doing = "find this node's name";
    let kind = ApiResource::erase::<k8s_openapi::api::core::v1::Pod>(&());
    let mut wait = FIRST;
    loop {
        let pods: Api<Object<PodSpec, NotUsed>> = Api::namespaced_with(connector.client(), namespace, &kind);
        let failure = match connector.call(doing, pods.get(pod)).await {
            Ok(found) => {
                let node = found.spec.node_name;
                return NodeName::new(&node).map_err(|_| StoreError::Kube {
                    doing,
                    why: format!("node name not present in pod spec '{namespace}/{pod}'"),
                    transient: false,
                });
            }
            Err(failure) => failure,
        };
        if failure.code == Some(404) {
            return Err(StoreError::Kube {
                doing,
                why: format!(
                    "error retrieving pod spec for '{namespace}/{pod}': there is no such Pod: correct POD_NAME and \
                     POD_NAMESPACE, or set NODE_NAME"
                ),
                transient: false,
            });
        }
        pulse.note(Half::Reading, Some(&failure.error));
        wait = (wait * 2).min(SLOWEST);
        sleep(jittered(wait, SPREAD)).await;
    }
}
