//! What an earlier process left in the kernel, by peer.

use std::collections::BTreeMap;

use keys::Slot;
use xfrm::{Direction, Sa, SaId};

use crate::kernel::{Key, Object, Objects, reqid_slot};

/// What an earlier process left for one peer.
#[derive(Clone, Debug, Default)]
pub(super) struct Leftover {
    pub(super) sas: BTreeMap<SaId, Sa>,
    pub(super) data: Option<SaId>,
}

/// Of all that is `left`, what each slot's peer has.
pub(super) fn leftovers(left: &Objects) -> BTreeMap<Slot, Leftover> {
    let mut all: BTreeMap<Slot, Leftover> = BTreeMap::new();
    for (key, object) in left {
        match (key, object) {
            (Key::Sa(id), Object::Sa { sa, .. }) => {
                if let Some(slot) = reqid_slot(sa.reqid) {
                    all.entry(slot).or_default().sas.insert(*id, (**sa).clone());
                }
            }
            (Key::Policy(id), Object::Policy(policy))
                if id.direction == Direction::Out && id.selector.protocol == 0 =>
            {
                if let Some(template) = &policy.template
                    && let Some(slot) = reqid_slot(template.reqid)
                {
                    all.entry(slot).or_default().data = Some(SaId {
                        dst: template.dst,
                        spi: template.spi,
                    });
                }
            }
            _ => {}
        }
    }
    all
}
