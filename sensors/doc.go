// Package sensors is the ingest wire format between a driver (anything that
// reads sensors) and the keep (which seals what it is given), both ends of it.
//
// # Transport
//
// A Unix stream socket. Both directions are lines of UTF-8 that end with "\n".
// A line has at most [MaxLine] bytes before its "\n". Bytes after the last
// "\n" of a connection are a line cut short and are dropped, by both ends. The
// keep reads no further than the limit: of a longer line it skips the rest, and
// refuses it as one line. Empty lines mean nothing and are not numbered.
//
// # Readings
//
// Every line that is not empty and does not start with "#" is one point in
// Influx line protocol: a measurement, tags, fields, and a time in nanoseconds
// since the Unix epoch, which may be left out:
//
//	line        = measurement *("," key "=" value) 1*SP field *("," field) [1*SP time] *SP
//	field       = key "=" (float / integer "i" / unsigned "u" / bool / DQUOTE string DQUOTE)
//
// Stricter than line protocol in the wild, and the same for [ParseLine] and
// [Point.AppendLine]: no duplicate tag or field, at most 64 tags and 256
// fields, no control character (Unicode Cc, so no NUL, tab or newline) in the
// line or hidden behind an escape, valid UTF-8, decimal finite numbers in
// range, no empty name or tag value, no name that ends in a backslash, no space
// in front. A line is taken whole or refused whole. By convention the tag
// "unit" is the SenML unit (RFC 8428, section 12.1) of every numeric field of
// the point.
//
// # Acknowledgements
//
// A source that sends only readings is never written to, and "nothing lost"
// begins for it where the keep commits. A driver that wants to know numbers its
// lines. Numbers are decimal without leading zeros, at most 2^63-1. Control
// lines start with "#", have at most 512 bytes and exactly one spelling each:
//
//	#hello 1 SESSION     driver, its first line; 1 is the version of this protocol
//	#seq N               driver: the next line has the number N, the ones after count up; N >= 1
//	#ack SESSION SEQ     keep: all lines of the session up to SEQ are committed or rejected
//	#err SEQ REASON      keep: line SEQ was rejected; comes before the #ack that covers it
//
// SESSION is 1 to 32 characters of A-Z a-z 0-9 and "-"; it names one sequence
// of lines, so whoever repeats the sequence repeats the name. REASON is text.
// Any other line that starts with "#" is a comment and is ignored by both ends;
// one of the four that is malformed ends the connection.
//
//  1. The driver says hello and waits. The keep answers with an #ack, once all
//     that it took of the session before is durable: the last number of that
//     session that it has consumed, 0 when there is none or when it knows
//     another session.
//  2. The driver sends #seq and the lines after that number.
//  3. The keep sends #ack as lines become durable, cumulatively. A rejected line
//     is consumed like any other and counts for nothing else.
//  4. After a broken connection the driver starts again at 1. A line that the
//     keep has consumed is not taken a second time: its number says so. A #seq
//     above the number expected is a gap, which the keep records.
//
// The driver keeps a line until it is acknowledged. If a hello is answered with
// less than was acknowledged before (the keep's state was lost), the driver goes
// on with the oldest line it still has and #seq tells the truth. If it is
// answered with more than was ever sent, the two do not agree on what the
// session is, and the driver stops with an error.
//
// # Example
//
// Two readings, of which the second is rejected; then the keep is restarted and
// the third one is sent to its successor.
//
//	driver: #hello 1 hall-7
//	keep:   #ack hall-7 0
//	driver: #seq 1
//	driver: climate,room=hall,unit=Cel temp=21.5 1700000000000000000
//	driver: climate,room=hall,unit=Cel temp="warm" 1700000001000000000
//	keep:   #err 2 field temp was a number before
//	keep:   #ack hall-7 2
//	keep:   (restarts)
//	driver: #hello 1 hall-7
//	keep:   #ack hall-7 2
//	driver: #seq 3
//	driver: climate,room=hall,unit=Cel temp=21.75 1700000002000000000
//	keep:   #ack hall-7 3
package sensors
