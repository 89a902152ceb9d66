//! SAs and policies: dump, writes, counters.

use std::collections::BTreeMap;

use nix::libc;
use xfrm::{Batch, Family, ForeignPolicy, ForeignSa, HashThreshold, Parsed, Policy, PolicyId, Sa, SaId, SaInfo, Xfrm};
use zeroize::Zeroizing;

use super::{gone_is_done, misfit, outcome, unread};
use crate::kernel::{Counters, Guard, Key, Object, Objects, Op, Write, WriteError, priority, reqid_slot};

/// Bytes of a request for an SA with its key, and for a policy with its template, at most.
const SA_REQUEST: usize = 512;
const POLICY_REQUEST: usize = 344;

/// The key of an SA that is ours, `None` for anyone else's.
pub(super) fn sa_key(sa: &Sa) -> Option<Key> {
    reqid_slot(sa.reqid).map(|_| Key::Sa(sa.id()))
}

/// The key of a policy that is ours, `None` for anyone else's.
pub(super) fn policy_key(policy: &Policy) -> Option<Key> {
    match &policy.template {
        Some(template) => reqid_slot(template.reqid).map(|_| Key::Policy(policy.id)),
        None if policy.priority == priority::PLAINTEXT => Some(Key::Policy(policy.id)),
        None => Guard::of_priority(policy.priority).map(|guard| Key::Guard(guard, policy.id)),
    }
}

/// Puts every SA and policy of ours into `objects`, and the hash thresholds where they are ours.
pub(super) fn dump(xfrm: &mut Xfrm, objects: &mut Objects) -> Result<(), WriteError> {
    for SaInfo { sa, .. } in sas(xfrm)? {
        objects.extend(sa_key(&sa).map(|key| {
            (
                key,
                Object::Sa {
                    sa: Box::new(sa),
                    born: None,
                },
            )
        }));
    }
    for policy in policies(xfrm)?.into_iter().filter_map(Parsed::known) {
        objects.extend(policy_key(&policy).map(|key| (key, Object::Policy(Box::new(policy)))));
    }
    thresholds(xfrm, objects)
}

/// The policy hash thresholds that bear our mark: nobody else has use for a local end of no bits.
fn thresholds(xfrm: &mut Xfrm, objects: &mut Objects) -> Result<(), WriteError> {
    for family in [Family::V4, Family::V6] {
        let found = xfrm
            .hash_threshold(family)
            .map_err(|error| unread("the policy hash thresholds", error))?;
        if let Some(HashThreshold { local: 0, remote }) = found {
            objects.insert(Key::HashThreshold(family), Object::HashThreshold { remote });
        }
    }
    Ok(())
}

/// Carries one operation on a policy hash threshold out; breaking one sets the kernel's own again.
pub(super) fn apply_threshold(xfrm: &mut Xfrm, op: &Op) -> Result<(), WriteError> {
    let (family, threshold) = match op {
        Op::Make(Key::HashThreshold(family), Object::HashThreshold { remote })
        | Op::Change(Key::HashThreshold(family), Object::HashThreshold { remote }) => {
            let (local, remote) = (0, *remote);
            (*family, HashThreshold { local, remote })
        }
        Op::Break(Key::HashThreshold(family)) => (*family, HashThreshold::standard(*family)),
        Op::Make(..) | Op::Change(..) | Op::Break(_) => return Err(misfit(op)),
    };
    let mut batch = Batch::new();
    batch.set_hash_threshold(family, threshold);
    let result = xfrm.execute(batch).into_iter().collect::<Result<Vec<()>, _>>();
    result.map(drop).map_err(|error| outcome(op, error))
}

/// Asks for a few numbers that the kernel has at hand.
pub(super) fn answers(xfrm: &mut Xfrm) -> Result<(), WriteError> {
    let asked = xfrm.hash_threshold(Family::V4);
    asked
        .map(drop)
        .map_err(|error| unread("the policies' hash threshold", error))
}

/// What our SAs have carried. `used` is the first use where the kernel tells no later one.
pub(super) fn counters(xfrm: &mut Xfrm) -> Result<BTreeMap<SaId, Counters>, WriteError> {
    let count = |info: SaInfo| {
        let errors = [info.integrity_failed, info.replay, info.replay_window];
        let counters = Counters {
            bytes: info.bytes,
            packets: info.packets,
            errors: errors.into_iter().map(u64::from).sum(),
            made: info.add_time,
            used: info.use_time,
        };
        reqid_slot(info.sa.reqid).map(|_| (info.sa.id(), counters))
    };
    let counters = xfrm.map_sas(count).map_err(|error| unread("the SAs", error))?;
    Ok(counters.into_iter().collect())
}

/// How many packets our SAs have carried.
pub(super) fn carried(xfrm: &mut Xfrm) -> Result<Vec<(SaId, u64)>, WriteError> {
    let count = |info: SaInfo| reqid_slot(info.sa.reqid).map(|_| (info.sa.id(), info.packets));
    xfrm.map_sas(count).map_err(|error| unread("the SAs", error))
}

fn sas(xfrm: &mut Xfrm) -> Result<impl Iterator<Item = SaInfo> + use<>, WriteError> {
    let found = xfrm.dump_sas().map_err(|error| unread("the SAs", error))?;
    Ok(found.into_iter().filter_map(Parsed::known))
}

fn policies(xfrm: &mut Xfrm) -> Result<Vec<Parsed<Policy, ForeignPolicy>>, WriteError> {
    xfrm.dump_policies().map_err(|error| unread("the policies", error))
}

/// Carries operations on SAs out, in one exchange; one result each. A made SA's key is wiped when it is in the kernel,
/// and stays in its write if the kernel refused it, unless the answer was lost.
///
/// A change with a key removes the SA and makes it anew: if the making is refused, nothing is left. A change without a
/// key changes limits and ports; the key stays (the kernel takes no other for an SA that exists).
pub(super) fn apply_sas(xfrm: &mut Xfrm, writes: &mut [Write]) -> Vec<Result<(), WriteError>> {
    let mut batch = xfrm.batch(writes.len() * SA_REQUEST);
    // What each request is of; the last request of an operation tells what became of it.
    let mut requests = Vec::with_capacity(writes.len());
    let mut results: Vec<Result<(), WriteError>> = Vec::with_capacity(writes.len());
    for (index, Write { op, secret }) in writes.iter().enumerate() {
        let before = batch.len();
        results.push(request_sa(&mut batch, op, secret.as_ref()));
        requests.extend((before..batch.len()).map(|_| index));
    }
    let mut taken = Vec::new();
    for (index, result) in requests.into_iter().zip(xfrm.execute(batch)) {
        let Write { op, .. } = &writes[index];
        let result = if matches!(op, Op::Break(_)) {
            gone_is_done(result)
        } else {
            result
        };
        if matches!(&result, Err(error) if error.exists()) {
            taken.push(index);
        }
        results[index] = result.map_err(|error| outcome(op, error));
    }
    if !taken.is_empty() {
        look_at_taken(xfrm, writes, &taken, &mut results);
    }
    for (write, result) in writes.iter_mut().zip(&results) {
        let unused = matches!(result, Err(WriteError::Refused { .. } | WriteError::Foreign { .. }));
        if !unused {
            write.secret = None;
        }
    }
    results
}

/// Appends the requests of one operation.
fn request_sa(batch: &mut Batch, op: &Op, secret: Option<&keys::SaKey>) -> Result<(), WriteError> {
    let no_key = |why: &str| {
        Err(WriteError::Failed {
            op: op.to_string(),
            why: why.into(),
        })
    };
    match (op, secret) {
        (Op::Make(Key::Sa(id), Object::Sa { sa, .. }) | Op::Change(Key::Sa(id), Object::Sa { sa, .. }), Some(key)) => {
            if key.spi().0 != sa.spi || sa.id() != *id || key.as_bytes().len() != sa.algorithm.key_len() {
                return no_key("the key is of another SA");
            }
            if matches!(op, Op::Change(..)) {
                batch.delete_sa(id);
            }
            batch.add_sa(sa, key.as_bytes());
        }
        (Op::Change(Key::Sa(_), Object::Sa { sa, .. }), None) => {
            let Some(key) = random_key(sa.algorithm.key_len()) else {
                return no_key("no random numbers");
            };
            batch.update_sa(sa, &key);
        }
        (Op::Make(Key::Sa(_), Object::Sa { .. }), None) => return no_key("there is no key for it"),
        (Op::Break(Key::Sa(id)), _) => batch.delete_sa(id),
        (Op::Make(..) | Op::Change(..) | Op::Break(_), _) => return Err(misfit(op)),
    }
    Ok(())
}

/// A key that nobody has: for requests that must carry one and put none into use. Should the SA be a larval one of
/// someone else's, it encrypts to no one, and not with zeros.
pub(super) fn random_key(length: usize) -> Option<Zeroizing<Vec<u8>>> {
    let mut key = Zeroizing::new(vec![0; length]);
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut key).ok()?;
    Some(key)
}

/// What stands where an SA of ours was to be made.
enum Taken {
    /// One of ours. Only its maker knows its generation, so it stays a refusal.
    Ours,
    /// What the kernel put there for a template of ours that names this SPI, while some program listens for acquires. An
    /// update gives it its first key.
    Larval,
    /// Someone else's, in words.
    Foreign(String),
}

impl Taken {
    fn of(parsed: &Parsed<SaInfo, ForeignSa>) -> Option<(SaId, Self)> {
        match parsed {
            Parsed::Known(SaInfo { sa, .. }) if reqid_slot(sa.reqid).is_some() => Some((sa.id(), Self::Ours)),
            Parsed::Known(SaInfo { sa, .. }) => {
                let found = format!("SA src {} {} reqid {}", sa.src, sa.id(), sa.reqid);
                Some((sa.id(), Self::Foreign(found)))
            }
            Parsed::Other(ForeignSa {
                dst,
                spi,
                protocol,
                reqid,
                reason,
            }) => {
                let id = SaId {
                    dst: (*dst)?,
                    spi: *spi,
                };
                let found = match reqid_slot(*reqid) {
                    Some(_) => Self::Larval,
                    None => Self::Foreign(format!("SA {id} reqid {reqid} ({reason})")),
                };
                (i32::from(*protocol) == libc::IPPROTO_ESP).then_some((id, found))
            }
        }
    }
}

/// Second try for SAs whose place is taken: fills in larval ones, names someone else's.
fn look_at_taken(xfrm: &mut Xfrm, writes: &[Write], taken: &[usize], results: &mut [Result<(), WriteError>]) {
    let Ok(found) = xfrm.dump_sas() else { return };
    let found: BTreeMap<SaId, Taken> = found.iter().filter_map(Taken::of).collect();
    let mut batch = Batch::new();
    let mut again = Vec::new();
    for &index in taken {
        let Write { op, secret: Some(key) } = &writes[index] else {
            continue;
        };
        let (Op::Make(Key::Sa(id), Object::Sa { sa, .. }) | Op::Change(Key::Sa(id), Object::Sa { sa, .. })) = op else {
            continue;
        };
        match found.get(id) {
            Some(Taken::Foreign(found)) => {
                let remedy = format!("ip xfrm state delete dst {} proto esp spi 0x{:08x}", id.dst, id.spi);
                results[index] = Err(WriteError::Foreign {
                    op: op.to_string(),
                    found: found.clone(),
                    remedy,
                });
            }
            Some(Taken::Larval) => {
                batch.update_sa(sa, key.as_bytes());
                again.push(index);
            }
            Some(Taken::Ours) | None => {}
        }
    }
    for (index, result) in again.into_iter().zip(xfrm.execute(batch)) {
        results[index] = result.map_err(|error| outcome(&writes[index].op, error));
    }
}

/// Carries operations on policies out, in one exchange; one result each.
///
/// A place that is taken by one of ours is written over in one step; someone else's policy is named and left.
pub(super) fn apply_policies(xfrm: &mut Xfrm, writes: &[Write]) -> Vec<Result<(), WriteError>> {
    let mut batch = xfrm.batch(writes.len() * POLICY_REQUEST);
    let mut requests = Vec::with_capacity(writes.len());
    let mut results: Vec<Result<(), WriteError>> = Vec::with_capacity(writes.len());
    for (index, Write { op, .. }) in writes.iter().enumerate() {
        let result = match op {
            Op::Make(Key::Policy(_) | Key::Guard(..), Object::Policy(policy)) => {
                batch.add_policy(policy);
                Ok(())
            }
            Op::Change(Key::Policy(_) | Key::Guard(..), Object::Policy(policy)) => {
                batch.set_policy(policy);
                Ok(())
            }
            Op::Break(Key::Policy(id) | Key::Guard(_, id)) => {
                batch.delete_policy(id);
                Ok(())
            }
            Op::Make(..) | Op::Change(..) | Op::Break(_) => Err(misfit(op)),
        };
        if result.is_ok() {
            requests.push(index);
        }
        results.push(result);
    }
    let mut taken = Vec::new();
    for (index, result) in requests.into_iter().zip(xfrm.execute(batch)) {
        let op = &writes[index].op;
        let result = if matches!(op, Op::Break(_)) {
            gone_is_done(result)
        } else {
            result
        };
        if matches!(&result, Err(error) if error.exists()) {
            taken.push(index);
        }
        results[index] = result.map_err(|error| outcome(op, error));
    }
    if !taken.is_empty() {
        write_over_ours(xfrm, writes, &taken, &mut results);
    }
    results
}

/// Second try for policies whose place is taken: replaces ours, names someone else's.
fn write_over_ours(xfrm: &mut Xfrm, writes: &[Write], taken: &[usize], results: &mut [Result<(), WriteError>]) {
    let Ok(found) = policies(xfrm) else { return };
    let mut theirs: BTreeMap<PolicyId, String> = BTreeMap::new();
    for parsed in found {
        match parsed {
            Parsed::Known(policy) if policy_key(&policy).is_none() => {
                theirs.insert(policy.id, describe(&policy));
            }
            Parsed::Other(ForeignPolicy {
                direction: Some(direction),
                selector: Some(selector),
                priority,
                reason,
            }) => {
                let id = PolicyId { direction, selector };
                theirs.insert(id, format!("policy {id} priority {priority} ({reason})"));
            }
            Parsed::Known(_) | Parsed::Other(_) => {}
        }
    }
    let mut batch = Batch::new();
    let mut again = Vec::new();
    for &index in taken {
        let (Op::Make(_, Object::Policy(policy)) | Op::Change(_, Object::Policy(policy))) = &writes[index].op else {
            continue;
        };
        match theirs.get(&policy.id) {
            Some(found) => {
                let remedy = format!("ip xfrm policy delete {}", policy.id);
                let (op, found) = (writes[index].op.to_string(), found.clone());
                results[index] = Err(WriteError::Foreign { op, found, remedy });
            }
            None => {
                batch.set_policy(policy);
                again.push(index);
            }
        }
    }
    for (index, result) in again.into_iter().zip(xfrm.execute(batch)) {
        results[index] = result.map_err(|error| outcome(&writes[index].op, error));
    }
}

fn describe(policy: &Policy) -> String {
    let Policy {
        id,
        priority,
        action,
        template,
    } = policy;
    let action = match action {
        xfrm::Action::Allow => "",
        xfrm::Action::Block => " action block",
    };
    let reqid = template
        .map(|template| format!(" reqid {}", template.reqid))
        .unwrap_or_default();
    format!("policy {id}{action} priority {priority}{reqid}")
}
