/*
 * The move of one workload instance between two nodes, A (0) and B (1).
 * `make model` checks it, and checks that it notices when a rule is left out.
 *
 * WHAT IS MODELLED. One instance, first live at A in epoch 1. It applies inputs
 * 1..INPUTS in batches of one; a batch commits state, cursor and output
 * together. Its holder may freeze it and ask the ledger to move it; either node
 * may be the source, so moves back, repeated commands and aborts race.
 *
 *   source                        target                     ledger
 *   LIVE(e)   <- offer, accept, pre-copy: nothing durable ->
 *   FROZEN(e,m)  commit
 *             -- ciphertext ----> HOLDING(m)  commit
 *             <-- receipt -------
 *             -- e -> e+1, target, m, fin ------------------>  compare and set
 *             <-- signed entry (e+1, target, m) --------------
 *   RELEASED(m)  irreversible commit: state and snapshot key are gone
 *             -- release(m) ----> LIVE(e+1)  commit
 *             <-- ack -----------
 *   NONE
 *
 * A source in doubt asks again, or asks for e -> e+1 with itself as the holder
 * (KEPT): that wins and it is LIVE(e+1), or it loses and it goes forward.
 *
 * NETWORK. A set: what was sent once may arrive any number of times, in any
 * order, at any time, or never. A message counts as sent by the commit that
 * allows it: "crashed before sending" is "never arrived". Ledger entries are
 * signed, so any entry ever written may be shown to a node, however old.
 *
 * CRASHES. At every step, without a bound: a node restarts from its last
 * commit. They add no states beyond what is only in memory.
 *
 * RESTORES. At most RESTORES times, at any time, to any node: its disk becomes
 * an image taken at any earlier moment (one image is kept at a time, until it is
 * used or useless). An irreversible commit makes the older images of that node
 * useless; a restored one then leaves the node with NONE. The ledger neither
 * crashes nor is restored, and the consumer is part of it.
 *
 * BOUNDS. Two nodes, INPUTS, FREEZES, RESTORES; so at most FREEZES + 1 epochs.
 *
 * PROPERTIES. The Judge fails when
 *   - two nodes are live at the ledger's epoch, or one that is not its holder;
 *   - two nodes hold the means to run: state they can open, in memory or on
 *     disk, LIVE or FROZEN, or HOLDING with the release message in the world;
 *   - the live instance is older than what the consumer accepted (except after
 *     a restored batch, until it has caught up), or a target starts so (never);
 *   - an output of a run that the ledger disowned is accepted, an output is
 *     accepted twice, an input is applied twice or skipped;
 *   - faults are over and the instance does not live on.
 *
 * LIVENESS is checked as safety. At any moment the run may turn calm: no more
 * crashes, restores and freezes, and a message arrives only if its sender, in
 * its present state, repeats it. No step of the calm can be undone (the check
 * CALM_ENDS searches for a cycle), so each fair run ends in a state without a
 * step, and there the Judge looks. Exact, because a fair run has a last fault,
 * a last freeze and a last arrival of a message that is not repeated; calm
 * starts after them, and weak fairness means that an enabled step is taken.
 * In the end the instance has applied all inputs, all outputs are accepted, the
 * other node is empty. Excused: a restore of a node took away a state that
 * existed nowhere else, and the ledger's last entry depends on that state.
 *
 * BY HAND, in a scratch directory with a copy of this file (spin leaves files):
 *
 *   spin -a -DFREEZES=3 move.pml && gcc -O2 -DSAFETY -DNOREDUCE -o pan pan.c && ./pan
 *   ./pan -S                                  the story of a counter-example
 *
 * To spin: -DINPUTS=n -DFREEZES=n -DRESTORES=n; -DMUTANT_x, a rule left out, must
 * fail; -DVARIANT_x, another protocol, must hold; -DREACH_x, a state that must be
 * reachable, must fail. gcc -DBFS finds a shortest counter-example. The bounds
 * that are checked are in testbench/model.
 */
#ifndef INPUTS
#define INPUTS 2
#endif
#ifndef FREEZES
#define FREEZES 2 /* attempts, at most 4 */
#endif
#ifndef RESTORES
#define RESTORES 1
#endif
#define LAST (FREEZES + 1) /* the highest epoch there can be */

#define NONE 0
#define LIVE 1
#define FROZEN 2
#define RELEASED 3
#define HOLDING 4

typedef Holding {
	byte kind;
	byte epoch; /* LIVE: its epoch; else the epoch that the attempt replaces */
	byte m;     /* the attempt; 0 when LIVE or NONE */
	byte cur;   /* inputs applied, as the cursor has it = outputs made */
	byte sum;   /* ghost: inputs applied, as the state has it */
	byte own;   /* 0; in MUTANT_OUTBOX_*, outputs up to here are another's */
};
Holding V[2]; /* in memory */
Holding D[2]; /* on disk */
byte key[2];  /* in memory: the attempt that this node, as a target, made a key for */
bit forgot[2]; /* only MUTANT_RELEASE_NOT_IN_STATE */

/* Attempts, one for each freeze: what its messages say, and which exist. */
byte used;
byte src[FREEZES + 1], from[FREEZES + 1], fin[FREEZES + 1], sum[FREEZES + 1];
bit held[FREEZES + 1], asked[FREEZES + 1], rel[FREEZES + 1], ack[FREEZES + 1];

/* Ledger entries: 0 is the first, then two for each attempt. */
#define MOVED(a) (2 * (a))    /* its target holds */
#define KEPT(a) (2 * (a) + 1) /* its source holds */
#define ABOUT(x) ((x) / 2)
#define EPOCH(x) ((x) == 0 -> 1 : from[ABOUT(x)] + 1)
#define HOLDER(x) ((x) == 0 -> 0 : (((x) & 1) -> src[ABOUT(x)] : 1 - src[ABOUT(x)]))
byte now;
bit written[2 * FREEZES + 2];

/* Consumer: it has accepted outputs 1..acc. */
byte acc;
byte out[LAST + 1];   /* outputs sent under an epoch: 1..out[e] */
byte fence[LAST + 1]; /* of a past epoch, only up to here */
byte view = 1;        /* only MUTANT_CONSUMER_STALE */
byte accOf[LAST + 1]; /* only MUTANT_DEDUP_BY_EPOCH */

/* Faults, and what the Judge must know of them. */
byte restores;
byte imageOf;  /* 1 + the node whose older image still opens; 0: none */
Holding image;
bit calm;
bit rolled; /* a restore took batches back; until the next move */
bit lost;   /* a restore took the only state */
byte gone;  /* bit a: a restore took what attempt a needs */
byte forgotten; /* bit a: a restore took its source back to before the freeze */

#define ME V[_pid]
#define PEER V[1 - _pid]
#define RUNS(n) (V[n].kind == LIVE || V[n].kind == FROZEN)
#define SAME(p, q) (p.kind == q.kind && p.epoch == q.epoch && p.m == q.m && p.cur == q.cur && p.sum == q.sum)
#define FAIL(what) printf(what); assert(false)

inline copy(p, q) {
	p.kind = q.kind; p.epoch = q.epoch; p.m = q.m; p.cur = q.cur; p.sum = q.sum; p.own = q.own
}
inline clear(p) { p.kind = NONE; p.epoch = 0; p.m = 0; p.cur = 0; p.sum = 0; p.own = 0 }
inline closeImage(n) {
	if
	:: imageOf == n + 1 -> imageOf = 0; clear(image)
	:: else
	fi
}
inline commit() { copy(D[_pid], ME) }
inline irreversible() { copy(D[_pid], ME); closeImage(_pid) }
inline nothing() { skip }
inline send() {
	if
	:: out[ME.epoch] < ME.cur -> out[ME.epoch] = ME.cur
	:: else
	fi
}

/* ---- THE RULES, each with the mutants that leave it out ----------------- */

/* 1. State, cursor and outputs of a batch are one commit; then outputs leave. */
#ifdef MUTANT_CURSOR_APART
inline batch() { ME.sum++; commit(); ME.cur++ }
#else
inline batch() { ME.sum++; ME.cur++; commit(); send() }
#endif

/* 2. Frozen, and the snapshot key, are committed before anything is sent. */
#ifdef MUTANT_FREEZE_NOT_COMMITTED
#define commitFreeze nothing
#else
#define commitFreeze commit
#endif

/* 3. The ledger is asked only after the target's receipt: the whole ciphertext
      and the key of this attempt are committed there. */
#define HOLDS_FOR_ME (held[ME.m] && (!calm || (PEER.kind == HOLDING && PEER.m == ME.m)))
#ifdef MUTANT_ASK_BEFORE_HELD
#define MAY_ASK true
#else
#define MAY_ASK HOLDS_FOR_ME
#endif

/* 4. What a target holds it drops only on a ledger entry of a later epoch that
      is not about this attempt; never on a timeout or a command. */
#ifdef MUTANT_TARGET_DROPS
#define MAY_GIVE_UP !calm
#else
#define MAY_GIVE_UP false
#endif

/* 5. The ledger compares the epoch that a write replaces. */
#ifdef MUTANT_CAS_WITHOUT_COMPARE
#define COMPARES(a, x) (now != (x))
#else
#define COMPARES(a, x) (EPOCH(now) == from[a])
#endif

/* 6. It refuses to hand over a state older than what was accepted. */
#ifdef MUTANT_ACCEPTED_IGNORED
#define NOT_OLDER(a) true
#else
#define NOT_OLDER(a) (acc <= fin[a])
#endif

/* 7. A source in doubt acts only on an entry of a later epoch: that one is
      final, however old the answer. An entry of its own epoch proves nothing. */
#ifdef MUTANT_STALE_READ
#define MAY_BELIEVE_A_READ (!calm || EPOCH(now) == ME.epoch)
#else
#define MAY_BELIEVE_A_READ false
#endif

/* 8. It compares the attempt, not only epoch and target. */
#ifdef MUTANT_ATTEMPT_IGNORED
#define MY_MOVE(x) (HOLDER(x) != _pid && EPOCH(x) == ME.epoch + 1)
#else
#define MY_MOVE(x) ((x) == MOVED(ME.m))
#endif

/* 9. A later entry whose source and holder are both this node is its own, even
      if it does not remember having asked: it goes on in that epoch. An entry
      that hands the instance to it from another node is no such thing: that
      state comes with the release, and what is here is an old one. */
#ifdef MUTANT_NO_ADOPT
#define MINE(x) ((x) == KEPT(ME.m))
#elif defined(MUTANT_ADOPT_ANY)
#define MINE(x) (HOLDER(x) == _pid)
#else
#define MINE(x) (HOLDER(x) == _pid && ((x) & 1))
#endif

/* 10. The destruction is irreversible. Reversible, two nodes hold the means to
       run; the ledger still lets only one be accepted (the variant, in which the
       Judge does not look at the means), but for that it needs rule 9. */
#if defined(MUTANT_ADOPT_ANY) && !defined(VARIANT_FENCING_ALONE)
#define VARIANT_FENCING_ALONE
#endif
#if defined(MUTANT_DESTROY_REVERSIBLE) || defined(VARIANT_FENCING_ALONE)
#define commitRelease commit
#else
#define commitRelease irreversible
#endif

/* 11. The release message exists only after it. */
#ifdef MUTANT_RELEASE_BEFORE_DESTROY
#define TOO_EARLY (!rel[ME.m] && written[MOVED(ME.m)])
#else
#define TOO_EARLY false
#endif

/* 12. The release message is in the state that is committed. */
#ifdef MUTANT_RELEASE_NOT_IN_STATE
#define SENDS_RELEASE(n) (V[n].kind == RELEASED && !forgot[n])
#define MESSAGE_IN_MEMORY(n) (ME.kind == RELEASED && !forgot[n])
#else
#define SENDS_RELEASE(n) (V[n].kind == RELEASED)
#define MESSAGE_IN_MEMORY(n) false
#endif

/* 13. It is repeated until the target's ack, or a still later entry. */
#ifdef MUTANT_FORGET_WITHOUT_ACK
#define MAY_FORGET true
#else
#define MAY_FORGET (ack[ME.m] && (!calm || ((RUNS(1 - _pid) || PEER.kind == RELEASED) && PEER.epoch > ME.epoch)))
#endif

/* 14. The target commits that it is live before it runs or acknowledges, and
       irreversibly: the same release must not start it again. */
#if defined(MUTANT_ACTIVATE_NOT_COMMITTED)
#define commitLive nothing
#elif defined(MUTANT_ACTIVATE_REVERSIBLE)
#define commitLive commit
#else
#define commitLive irreversible
#endif

/* 15. The key that opens a release is of one attempt, and dies with it. */
#ifdef MUTANT_RELEASE_REPLAYED
#define ANSWERS_AGAIN(a) ((a) <= used && !calm && ME.kind == NONE && rel[a] && src[a] != _pid)
#else
#define ANSWERS_AGAIN(a) false
#endif

/*     Nor does an old offer that comes again replace what is held or released. */
#ifdef MUTANT_TARGET_REPLACES
#define OFFERED_AGAIN(a) ((a) <= used && !calm && (ME.kind == HOLDING || ME.kind == RELEASED) && src[a] != _pid && (a) != ME.m)
#else
#define OFFERED_AGAIN(a) false
#endif

/* 16. Outputs not yet acknowledged by the consumer are part of the snapshot: the
       target sends them again under its own epoch. Left at the source, they
       are lost with it. */
#if defined(MUTANT_OUTBOX_LEFT_BEHIND) || defined(MUTANT_OUTBOX_AT_SOURCE) || defined(VARIANT_DRAINED)
#define OUTBOX_FROM ME.cur
#else
#define OUTBOX_FROM 0
#endif
#ifdef VARIANT_DRAINED /* freezes only when there are none: holds as well */
#define MAY_FREEZE (acc >= ME.cur)
#else
#define MAY_FREEZE true
#endif
#ifdef MUTANT_OUTBOX_AT_SOURCE
#define KEEPS_SENDING(n, ep) (V[n].kind == RELEASED && V[n].epoch == (ep) && fin[V[n].m] > acc && acc >= V[n].own)
#define OUTBOX_EMPTY (acc >= fin[ME.m])
#else
#define KEEPS_SENDING(n, ep) false
#define OUTBOX_EMPTY true
#endif

/* 17. The consumer accepts outputs of the ledger's epoch, and of past ones up to
       where the following epochs started. One step with the ledger's. */
#define DISOWNED(ep) (EPOCH(now) > (ep) && acc >= fence[ep])
#if defined(MUTANT_NO_EPOCH_IN_OUTPUT)
#define ADMITS(ep) true
#elif defined(MUTANT_CONSUMER_STALE)
#define ADMITS(ep) (view <= (ep) || acc < fence[ep])
#elif defined(VARIANT_CURRENT_EPOCH_ONLY)
#define ADMITS(ep) (EPOCH(now) == (ep)) /* simpler: holds as well */
#else
#define ADMITS(ep) (!DISOWNED(ep))
#endif

/* 18. It counts by number alone: a number is accepted once, over all epochs. */
#ifdef MUTANT_DEDUP_BY_EPOCH
#define ACCEPTED(ep) accOf[ep]
#else
#define ACCEPTED(ep) acc
#endif

/* Variant: a source that can still open a state has not released. Restored to
   before the freeze, and shown that its own move was written, it does not drop
   what it has but takes the instance back with a new attempt (an irreversible
   commit, then KEPT). Then such a restore is no excuse for not living on. */
#ifdef VARIANT_TAKE_BACK
#define TAKES_BACK(x) (src[ABOUT(x)] == _pid && used < FREEZES)
#define NO_WAY_BACK (used == FREEZES)
#else
#define TAKES_BACK(x) false
#define NO_WAY_BACK true
#endif

/* ---- A node -------------------------------------------------------------- */

inline drop() { printf("%c drops what it has\n", 65 + _pid); clear(ME); commit() }
inline goOn(at) {
	printf("%c is live at epoch %d, %d inputs applied\n", 65 + _pid, at, ME.cur);
	ME.kind = LIVE; ME.epoch = at; ME.m = 0; commit(); send()
}
inline freeze(at) {
	used++;
	printf("%c freezes at epoch %d, %d inputs applied: attempt %d\n", 65 + _pid, at, ME.cur, used);
	src[used] = _pid; from[used] = at; fin[used] = ME.cur; sum[used] = ME.sum;
	ME.kind = FROZEN; ME.epoch = at; ME.m = used
}
inline destroy() {
	printf("%c destroys its means to run attempt %d\n", 65 + _pid, ME.m);
	ME.kind = RELEASED; ME.cur = 0; ME.sum = 0;
	commitRelease(); rel[ME.m] = 1; forgot[_pid] = 0
}
inline hold(a) {
	ME.kind = HOLDING; ME.m = a; ME.epoch = from[a]; ME.own = 0;
	printf("%c holds the ciphertext of attempt %d\n", 65 + _pid, a);
	commit(); held[a] = 1
}
inline activate(a) {
	ME.kind = LIVE; ME.epoch = from[a] + 1;
	ME.cur = fin[a]; ME.sum = sum[a]; ME.own = OUTBOX_FROM;
	printf("%c gets the release of attempt %d: live at epoch %d, %d inputs applied\n", 65 + _pid, a, ME.epoch, ME.cur);
	ack[a] = 1; ME.m = 0; /* a is not read after this: it may be ME.m */
	rolled = 0; commitLive(); send();
	if
	:: ME.cur < acc -> FAIL("BROKEN: a target starts from a state older than what was accepted\n")
	:: else
	fi
}

/* A signed ledger entry, maybe an old one, is shown to this node. In the calm
   that is the present one, in answer to what the node repeats. */
#define SHOWN(x) (ABOUT(x) <= used && written[x] && (!calm || now == (x)))
#define LATER(x) (EPOCH(x) > ME.epoch)
#define SEE(x) \
	:: d_step { RUNS(_pid) && SHOWN(x) && LATER(x) -> \
		if \
		:: ME.kind == FROZEN && MY_MOVE(x) -> destroy() \
		:: !(ME.kind == FROZEN && MY_MOVE(x)) && MINE(x) -> goOn(EPOCH(x)) \
		:: !(ME.kind == FROZEN && MY_MOVE(x)) && !MINE(x) && TAKES_BACK(x) -> freeze(EPOCH(x)); irreversible() \
		:: else -> drop() \
		fi } \
	:: d_step { ME.kind == HOLDING && SHOWN(x) && LATER(x) && (x) != MOVED(ME.m) -> drop() } \
	:: d_step { ME.kind == RELEASED && SHOWN(x) && EPOCH(x) > ME.epoch + 1 && OUTBOX_EMPTY -> drop() }

active [2] proctype Node()
{
	d_step {
		if
		:: _pid == 0 -> ME.kind = LIVE; ME.epoch = 1; commit(); written[0] = 1
		:: else
		fi
	};
end:	do
	:: d_step { ME.kind == LIVE && ME.cur < INPUTS -> batch(); printf("%c applies input %d\n", 65 + _pid, ME.cur) }
#ifdef MUTANT_CURSOR_APART
	:: d_step { ME.kind == LIVE && !SAME(ME, D[_pid]) -> commit(); send() }
#endif

	/* Source. Offer, accept and pre-copy leave nothing durable, so they are in
	   the step of the freeze; the target made a key, and loses it when it
	   crashes before it holds. */
	:: d_step { !calm && ME.kind == LIVE && used < FREEZES && PEER.kind == NONE && MAY_FREEZE ->
		freeze(ME.epoch); commitFreeze(); key[1 - _pid] = used }
	:: d_step { ME.kind == FROZEN && !asked[ME.m] && MAY_ASK -> asked[ME.m] = 1;
		printf("%c asks the ledger for attempt %d\n", 65 + _pid, ME.m) }
	:: d_step { ME.kind == FROZEN && MAY_BELIEVE_A_READ -> goOn(ME.epoch) }
	:: d_step { ME.kind == FROZEN && TOO_EARLY -> rel[ME.m] = 1;
		printf("%c sends the release of attempt %d\n", 65 + _pid, ME.m) }
	:: d_step { ME.kind == RELEASED && MAY_FORGET && OUTBOX_EMPTY -> drop() }

	/* Target. */
	:: d_step { ME.kind == NONE && key[_pid] != 0 && (!calm || (PEER.kind == FROZEN && PEER.m == key[_pid])) ->
		hold(key[_pid]); key[_pid] = 0 }
	:: d_step { ME.kind == HOLDING && rel[ME.m] && (!calm || (SENDS_RELEASE(1 - _pid) && PEER.m == ME.m)) -> activate(ME.m) }
	:: d_step { ME.kind == HOLDING && MAY_GIVE_UP -> drop() }
	:: d_step { ANSWERS_AGAIN(1) -> activate(1) }
	:: d_step { OFFERED_AGAIN(1) -> hold(1) }

	/* Either. */
	SEE(2) SEE(3)
#if FREEZES > 1
	SEE(4) SEE(5)
#endif
#if FREEZES > 2
	SEE(6) SEE(7)
#endif
#if FREEZES > 3
	SEE(8) SEE(9)
#endif

	/* Faults: a crash, an image taken, the image restored, an image restored
	   that does not open. */
	:: d_step { !calm && (key[_pid] != 0 || !SAME(ME, D[_pid]) || MESSAGE_IN_MEMORY(_pid)) ->
		printf("%c crashes\n", 65 + _pid);
		copy(ME, D[_pid]); key[_pid] = 0; forgot[_pid] = (ME.kind == RELEASED) }
	:: d_step { !calm && restores < RESTORES && imageOf == 0 -> imageOf = _pid + 1; copy(image, D[_pid]);
		printf("an image of %c is taken\n", 65 + _pid) }
	:: d_step { !calm && restores < RESTORES && imageOf == _pid + 1 && !SAME(image, D[_pid]) ->
		printf("%c is restored to the image\n", 65 + _pid);
		restores++;
		if
		:: (D[_pid].kind == LIVE || D[_pid].kind == FROZEN) && image.kind != LIVE && image.kind != FROZEN -> lost = 1
		:: (D[_pid].kind == LIVE || D[_pid].kind == FROZEN) && image.cur < D[_pid].cur -> rolled = 1
		:: else
		fi;
		if
		:: D[_pid].kind == FROZEN -> forgotten = forgotten | (1 << D[_pid].m)
		:: D[_pid].kind == HOLDING -> gone = gone | (1 << D[_pid].m)
		:: D[_pid].kind == RELEASED && image.kind != RELEASED && !ack[D[_pid].m] -> gone = gone | (1 << D[_pid].m)
		:: else
		fi;
		copy(D[_pid], image); copy(ME, image); key[_pid] = 0; forgot[_pid] = 0; closeImage(_pid) }
	:: d_step { !calm && restores < RESTORES && D[_pid].kind != NONE ->
		printf("%c is restored to an image that does not open\n", 65 + _pid);
		restores++;
		if
		:: D[_pid].kind == LIVE || (D[_pid].kind == FROZEN && now != MOVED(D[_pid].m)) -> lost = 1
		:: D[_pid].kind == RELEASED && ack[D[_pid].m]
		:: else -> gone = gone | (1 << D[_pid].m)
		fi;
		clear(ME); clear(D[_pid]); key[_pid] = 0; forgot[_pid] = 0; closeImage(_pid) }
	od
}

/* ---- The ledger ------------------------------------------------------------ */

inline write(x, a) {
	now = x; written[x] = 1;
	e = 1;
	do
	:: e <= from[a] ->
		if
		:: fence[e] > fin[a] -> fence[e] = fin[a]
		:: else
		fi;
		e++
	:: else -> break
	od;
	e = 0;
	printf("the ledger writes: epoch %d, holder %c, attempt %d\n", EPOCH(x), 65 + HOLDER(x), a)
}
/* KEPT counts as asked for from the freeze on. */
#define REPEATS(a) (!calm || (V[src[a]].kind == FROZEN && V[src[a]].m == (a)))
#define LEDGER(a) \
	:: d_step { (a) <= used && asked[a] && REPEATS(a) && COMPARES(a, MOVED(a)) && NOT_OLDER(a) -> write(MOVED(a), a) } \
	:: d_step { (a) <= used && REPEATS(a) && COMPARES(a, KEPT(a)) -> write(KEPT(a), a) }

active proctype Ledger()
{
	byte e;
	d_step {
		e = 1;
		do
		:: e < LAST -> fence[e] = INPUTS; e++
		:: else -> break
		od;
		e = 0
	};
end:	do
	LEDGER(1)
#if FREEZES > 1
	LEDGER(2)
#endif
#if FREEZES > 2
	LEDGER(3)
#endif
#if FREEZES > 3
	LEDGER(4)
#endif
	od
}

/* ---- The consumer ------------------------------------------------------------ */

#define SENDS(n, ep) ((RUNS(n) && V[n].epoch == (ep) && V[n].cur > acc && acc >= V[n].own) || KEEPS_SENDING(n, ep))
#define ARRIVES(ep) ((!calm && out[ep] > ACCEPTED(ep)) || (calm && (SENDS(0, ep) || SENDS(1, ep))))
#define CONSUME(ep) \
	:: d_step { ARRIVES(ep) && ADMITS(ep) -> \
		printf("the consumer accepts output %d of epoch %d\n", ACCEPTED(ep) + 1, ep); \
		if \
		:: ACCEPTED(ep) < acc -> FAIL("BROKEN: an output was accepted twice\n") \
		:: DISOWNED(ep) -> FAIL("BROKEN: an output of a disowned run was accepted\n") \
		:: else \
		fi; \
		acc++; TALLY(ep) }
#ifdef MUTANT_DEDUP_BY_EPOCH
#define TALLY(ep) accOf[ep]++
#else
#define TALLY(ep) skip
#endif

active proctype Consumer()
{
end:	do
	CONSUME(1) CONSUME(2)
#if FREEZES > 1
	CONSUME(3)
#endif
#if FREEZES > 2
	CONSUME(4)
#endif
#if FREEZES > 3
	CONSUME(5)
#endif
#ifdef MUTANT_CONSUMER_STALE
	:: d_step { view < EPOCH(now) -> view++ }
#endif
	od
}

/* ---- The judge --------------------------------------------------------------- */

#define ACTIVE(n) (V[n].kind == LIVE && V[n].epoch == EPOCH(now))
#define CAN_RUN(h) (h.kind == LIVE || h.kind == FROZEN || (h.kind == HOLDING && rel[h.m]))
#define MEANS(n) (CAN_RUN(V[n]) || CAN_RUN(D[n]))
#define OLD(n) (ACTIVE(n) && V[n].cur < acc)
#define TORN(n) (RUNS(n) && V[n].cur != V[n].sum)
/* A ciphertext of an attempt that its restored source knows nothing of may stay. */
#define EMPTY(n) (V[n].kind == NONE || (V[n].kind == HOLDING && ((gone | forgotten) & (1 << V[n].m))))
#define SETTLED(n) (ACTIVE(n) && HOLDER(now) == n && V[n].cur == INPUTS && EMPTY(1 - n))
#define DEPENDS_ON(mask) ((now & 1) == 0 && (mask & (1 << ABOUT(now))))
#define EXCUSED (lost || DEPENDS_ON(gone) || (DEPENDS_ON(forgotten) && NO_WAY_BACK))

/* States that must be reachable, or the model proves nothing. */
#if defined(REACH_THERE_AND_BACK) /* moved twice, no fault, all done */
#define REACHED (calm && restores == 0 && now == MOVED(2) && src[2] == 1 && SETTLED(0) && acc == INPUTS)
#elif defined(REACH_ABORT_RACE) /* move and abort were both asked for, the abort won */
#define REACHED (asked[1] && written[KEPT(1)] && ACTIVE(0))
#elif defined(REACH_LATE_OUTPUT) /* an output of a past epoch is still welcome */
#define REACHED (EPOCH(now) == 2 && acc < out[1] && ADMITS(1))
#elif defined(REACH_CLONE) /* a restored source runs on, fenced */
#define REACHED (V[0].kind == LIVE && now == MOVED(1) && V[0].cur > fin[1])
#elif defined(REACH_REFUSED) /* the ledger refuses a state older than accepted */
#define REACHED (asked[1] && EPOCH(now) == from[1] && V[0].kind == FROZEN && acc > fin[1])
#elif defined(REACH_TAKEN_BACK) /* with VARIANT_TAKE_BACK: after a restore, all done */
#define REACHED (calm && forgotten == 2 && written[MOVED(1)] && now == KEPT(2) && SETTLED(0) && acc == INPUTS)
#else
#define REACHED false
#endif

active proctype Judge()
{
end:	do
	:: d_step { REACHED -> FAIL("REACHED\n") }
	:: d_step { ACTIVE(0) && ACTIVE(1) -> FAIL("BROKEN: two nodes are live at the epoch of the ledger\n") }
	:: d_step { (ACTIVE(0) && HOLDER(now) != 0) || (ACTIVE(1) && HOLDER(now) != 1) -> FAIL("BROKEN: a node is live at the epoch of the ledger and not its holder\n") }
#ifndef VARIANT_FENCING_ALONE
	:: d_step { MEANS(0) && MEANS(1) -> FAIL("BROKEN: two nodes hold the means to run\n") }
#endif
	:: d_step { !rolled && (OLD(0) || OLD(1)) -> FAIL("BROKEN: the live instance is older than what was accepted\n") }
	:: d_step { TORN(0) || TORN(1) -> FAIL("BROKEN: an input was applied twice or skipped\n") }
	:: d_step { !calm -> calm = 1; printf("calm: no more faults and moves\n");
		closeImage(0); closeImage(1); copy(D[0], V[0]); copy(D[1], V[1]) }
	:: atomic { calm && timeout ->
		if
		:: EXCUSED || ((SETTLED(0) || SETTLED(1)) && acc == INPUTS)
		:: else -> FAIL("BROKEN: faults are over and the instance does not live on\n")
		fi } -> break
	od
}

#ifdef CHECK_CALM_ENDS
/* With gcc -DNOSTUTTER and pan -a: fails if the calm has a cycle. */
never {
	do
	:: calm -> break
	:: true
	od;
accept:	do
	:: calm
	od
}
#endif
